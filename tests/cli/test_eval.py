"""``edgellm eval``: what it shows, its JSON, and how it refuses. Its figures: tests/parity."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm.side_by_side import evaluate

from .conftest import Command

TinyModel = Callable[[str], Path]

KEYS = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "reference_perplexity",
    "perplexity_increase",
    "kld_mean",
    "top1_agreement",
    "rms_delta_p",
    "mean_delta_p",
)
"""Figures with a standard error; ``kld_median``, ``kld_p99`` and ``kld_max`` have none."""

TEXT = "The quick brown fox jumps over the lazy dog, and I have 12 apples.\n" * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_against_the_source(command: Command, onnx_artifact: Path, model: Path, text: Path) -> None:
    asked = ("eval", onnx_artifact, "--reference", model, "--text", text, "--window", 64)
    done = command(*asked, "--json")
    assert done.code == 0
    assert done.err == ""
    found = done.json()
    for key in KEYS:
        assert found[key] is not None
        assert found[f"{key}_stderr"] > 0
    assert 0 < found["kld_median"] < found["kld_p99"] < found["kld_max"]
    assert found["corpus_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert found["windows_sha256"] != found["tokenizer_sha256"] != found["corpus_sha256"]
    assert (found["runtime"], found["reference_runtime"]) == ("onnxruntime", "float")
    shown = command(*asked)
    assert shown.code == 0
    for fact in (
        f"perplexity        {found['perplexity']:.4g} ± ",
        f"{found['kld_mean']:.4g} ± {found['kld_mean_stderr']:.2g} nats",
        f"{found['top1_agreement']:.2%} ± ",
        f"{found['tokens']:,} tokens ({found['words']:,} words, {found['text_bytes']:,} bytes)",
        "as llama-perplexity does",
        found["corpus_sha256"],
        found["tokenizer_sha256"],
    ):
        assert fact in shown.out


def test_alone(command: Command, model: Path) -> None:
    """A folder in float, on the built-in text, whose documents are cut to the model's context."""
    found = command("eval", model, "--tokens", 300, "--json").json()
    assert (found["runtime"], found["reference"], found["text"]) == ("float", None, "builtin")
    assert (found["tokens"], found["window_tokens"]) == (300, 256)
    assert found["kld_mean"] is None
    assert found["perplexity"] > 1
    shown = command("eval", model, "--tokens", 300).out
    assert "KL" not in shown
    assert "reference" not in shown


def test_a_model_is_nothing_away_from_itself(command: Command, model: Path, text: Path) -> None:
    asked = ("eval", model, "--reference", model, "--text", text, "--json")
    found = command(*asked).json()
    assert found["kld_max"] == pytest.approx(0, abs=1e-12)
    assert found["top1_agreement"] == 1
    assert found["rms_delta_p"] == found["perplexity_increase"] == 0


def test_different_tokenizers_are_refused(
    command: Command, model: Path, tiny_model: TinyModel
) -> None:
    other = tiny_model("gpt2")
    done = command("eval", model, "--reference", other)
    assert done.code == 2
    assert "different tokenizers: they split builtin differently from token" in done.err
    assert "compare word_perplexity or byte_perplexity" in done.err


def test_the_weights_values_instead_of_a_runtime(
    command: Command, gguf_artifact: Path, text: Path
) -> None:
    asked = ("eval", gguf_artifact, "--text", text, "--runtime", "float", "--json")
    found = command(*asked).json()
    assert found["runtime"] == "float"
    assert found["perplexity"] > 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--window", "4096"), 2, "longer than the context"),
        (("--window", "2"), 2, "at least 4 tokens"),
        (("--tokens", "0"), 2, "at least 1 token"),
        (("--score", "most"), 2, "half, all"),
        (("--text", "nowhere.txt"), 2, "nowhere.txt"),
        (("--runtime", "warp"), 2, "warp"),
        (("--runtime", "float"), 5, "--runtime float"),
        (("--reference-runtime", "llamacpp"), 2, "no reference"),
        (("--reference", "./nowhere"), 3, "./nowhere"),
    ],
)
def test_refusals(
    options: tuple[str, ...], code: int, says: str, command: Command, onnx_artifact: Path
) -> None:
    done = command("eval", onnx_artifact, *options)
    assert done.code == code, done.err
    assert says in done.err
    assert done.out == ""


def test_a_folder_runs_on_no_runtime(command: Command, model: Path) -> None:
    done = command("eval", model, "--runtime", "onnxruntime")
    assert done.code == 5
    assert "convert it first" in done.err


def test_damage_is_found_before_anything_is_measured(
    command: Command, model: Path, tmp_path: Path
) -> None:
    import edgellm

    out = tmp_path / "damaged"
    edgellm.convert(model, out, format="onnx", quant="rtn:int4-g32", check=False)
    (data,) = out.glob("*.data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = command("eval", out)
    assert done.code == 8
    assert data.name in done.err


def test_many_windows_of_hidden_states_are_computed_in_groups(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, text, window_tokens=32)
    monkeypatch.setattr("edgellm.answers.HIDDEN_BYTES", 4 * 96 * 70)
    seen: list[str] = []
    parts = evaluate(model, text, window_tokens=32, progress=lambda event: seen.append(event.item))
    assert seen.count("layer 0") == -(-parts.window_count // 2) > 1
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert math.isfinite(parts.perplexity)


def test_an_onnx_folder_without_a_manifest(
    command: Command, onnx_artifact: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    """Computed at once from empty caches, it answers as the artifact does step by step."""
    plain = tmp_path / "plain"
    shutil.copytree(onnx_artifact, plain)
    (plain / "manifest.json").unlink()
    asked = ("--reference", model, "--text", text, "--json")
    found, wanted = (command("eval", path, *asked).json() for path in (plain, onnx_artifact))
    assert found["runtime"] == "onnxruntime"
    assert "unverified" in found["notes"][0]
    assert found["windows_sha256"] == wanted["windows_sha256"]
    assert found["kld_mean"] == pytest.approx(wanted["kld_mean"], rel=1e-3)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)


def test_a_folder_with_weights_and_onnx_is_taken_by_its_weights(
    command: Command, onnx_artifact: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    both = shutil.copytree(model, tmp_path / "both")
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(onnx_artifact / name, both / name)
    asked = ("eval", both, "--text", text, "--json")
    assert command(*asked).json()["runtime"] == "float"
    assert command(*asked, "--runtime", "onnxruntime").json()["runtime"] == "onnxruntime"


def test_a_graph_that_asks_for_more_is_refused(
    command: Command, model: Path, tmp_path: Path
) -> None:
    import onnx

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = ["batch", "tokens", 8]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("pixels", "logits")]
    node = helper.make_node("Identity", ["pixels"], ["logits"])
    graph = helper.make_graph([node], "other", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder = shutil.copytree(model, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    onnx.save(made, folder / "model.onnx")
    done = command("eval", folder)
    assert done.code == 5
    assert "asks for pixels, which is not known" in done.err
