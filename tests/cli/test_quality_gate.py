"""The comparison that ends a conversion: what it records, and how limits make it a gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm import forward
from edgellm.artifact import open_artifact, verify
from edgellm.errors import RuntimeMissing
from edgellm.manifest import read_manifest
from edgellm.side_by_side import evaluate

from .conftest import Command, Done
from .test_convert_adapter import write_adapter

TEXT = "The quick brown fox jumps over the lazy dog, and I have 12 apples.\n" * 6

Convert = Callable[..., Done]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "small"


@pytest.fixture
def convert(command: Command, model: Path, out: Path) -> Convert:
    """The tiny model in four bits, with what else is asked."""

    def call(*options: object) -> Done:
        return command(
            "convert", model, "-o", out, "--format", "onnx", "-q", "rtn:int4-g32", *options
        )

    return call


def quality(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(out).measured["quality"]
    return found


def test_the_manifest_has_what_eval_finds(
    convert: Convert, model: Path, out: Path, text: Path
) -> None:
    """Whose figures are compared with transformers and llama.cpp elsewhere."""
    done = convert("--check-text", text)
    assert done.code == 0, done.err
    found = quality(out)
    again = evaluate(out, text, reference=model, window_tokens=256, score="all")
    for name in ("tokens", "words", "text_bytes", "corpus_sha256", "windows_sha256", "runtime"):
        assert found[name] == getattr(again, name)
    for name in ("kld_mean", "kld_mean_stderr", "kld_p99", "perplexity", "reference_perplexity"):
        assert found[name] == pytest.approx(getattr(again, name), rel=1e-5)
    assert found["kld_mean"] > 0.001
    assert found["rejected"] == ""
    assert (
        f"answers: KL {found['kld_mean']:.3g} ± {found['kld_mean_stderr']:.2g} nats to the source, "
        f"top-1 {found['top1_agreement']:.0%}, perplexity {found['reference_perplexity']:.4g} -> "
        f"{found['perplexity']:.4g} ({found['tokens']:,} tokens)"
    ) in done.err


def test_it_does_not_change_what_the_artifact_is(convert: Convert, out: Path) -> None:
    assert convert("--no-check").code == 0
    plain = read_manifest(out)
    assert "quality" not in plain.measured
    assert convert("--force", "--check-tokens", 64, "--max-kld", 5, "--no-check").code == 0
    assert read_manifest(out).sha256 == plain.sha256
    assert quality(out)["tokens"] < 64  # a limit is checked all the same


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (("--max-kld", "1e-6"), "nats (KL) from the source's, and --max-kld allows 1e-06"),
        (
            ("--max-ppl-increase", "0.0001%"),
            "% above the source's, and --max-ppl-increase allows 0.0001 %",
        ),
    ],
)
def test_what_exceeds_a_limit_is_put_aside(
    limit: tuple[str, str], says: str, convert: Convert, out: Path, tmp_path: Path
) -> None:
    assert convert("--no-check").code == 0
    before = (out / "manifest.json").read_bytes()
    text = tmp_path / "easy.txt"  # on which rounding is known to cost, not to gain
    text.write_text("A tokenizer splits a text into tokens, and a model turns the tokens.")
    done = convert("--force", *limit, "--check-text", text)
    aside = out.with_name("small.rejected")
    assert done.code == 8
    assert says in done.err
    assert f"kept apart, in {aside}" in done.err
    assert "--quant gptq:int4-g32" in done.err
    assert (out / "manifest.json").read_bytes() == before
    assert says in quality(aside)["rejected"]
    verify(open_artifact(aside))
    assert {path.name for path in out.parent.iterdir()} == {"small", "small.rejected"}


def test_what_keeps_the_limits_takes_its_place(convert: Convert, out: Path) -> None:
    done = convert("--max-kld", 5, "--max-ppl-increase", "900%", "--check-tokens", 64)
    assert done.code == 0, done.err
    assert {path.name for path in out.parent.iterdir()} == {"small"}


def test_a_large_model_is_compared_on_less_or_when_asked(
    convert: Convert, out: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm.source import open_source

    parameters = sum(ref.size for ref in open_source(str(model)).tensors.values())
    monkeypatch.setattr("edgellm.quality_gate.MOST_WORK", 150 * parameters)
    assert convert().code == 0
    assert 100 < quality(out)["tokens"] < 150
    monkeypatch.setattr("edgellm.quality_gate.MOST_WORK", 100 * parameters)
    done = convert("--force")
    assert "not compared with the source" in done.err
    assert f"edgellm eval {out} --reference {model}" in done.err
    assert convert("--force", "--check-tokens", 32).code == 0
    assert 16 < quality(out)["tokens"] < 32


def test_floats_are_not_compared_unasked(command: Command, model: Path, out: Path) -> None:
    asked = ("convert", model, "-o", out, "--format", "onnx", "-q", "f32")
    done = command(*asked)
    assert done.code == 0
    assert "answers" not in done.err
    assert "quality" not in read_manifest(out).measured
    assert command(*asked, "--force", "--max-kld", "1e-6").code == 0
    assert quality(out)["kld_mean"] < 1e-8


def test_without_a_runtime_the_weights_values_are_compared(
    command: Command, model: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeMissing("nothing here runs gguf files: pip install something")

    monkeypatch.setattr("edgellm.chat.open", missing)
    asked = ("--format", "gguf", "-q", "rtn:q4_0", "--check-text", text)
    done = command("convert", model, "-o", out, *asked)
    assert done.code == 0, done.err
    assert "by its values in float)" in done.err
    found = quality(out)
    again = evaluate(out, text, reference=model, runtime="float", window_tokens=256, score="all")
    assert found["runtime"] == "float"
    assert found["kld_mean"] == pytest.approx(again.kld_mean, rel=1e-6)
    assert found["kld_mean"] > 0.001


def test_an_adapter_is_measured_in_one_pass(
    command: Command,
    convert: Convert,
    model: Path,
    out: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Base and merged model are computed once each; the merged one is the source."""
    computed: list[str] = []
    whole = forward.hidden_states

    def counted(source: Any, *arguments: Any, **options: Any) -> Any:
        computed.append(source.name)
        return whole(source, *arguments, **options)

    monkeypatch.setattr("edgellm.forward.hidden_states", counted)
    lora = write_adapter(tmp_path / "lora")
    done = convert("--adapter", lora, "--check-text", text, "--min-survival", 0)
    assert done.code == 0, done.err
    assert len(computed) == 2
    assert command("merge", model, "--adapter", lora, "-o", tmp_path / "merged").code == 0
    merged = tmp_path / "merged"
    again = evaluate(out, text, reference=merged, window_tokens=256, score="all")
    assert quality(out)["kld_mean"] == pytest.approx(again.kld_mean, rel=1e-5)
    assert quality(out)["windows_sha256"] == again.windows_sha256
    assert read_manifest(out).measured["survival"]["from_quantized"]["kl"] > 0


def test_adapters_beside_a_base_are_left_out(
    command: Command, model: Path, out: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lora = write_adapter(tmp_path / "lora")
    asked = ("--format", "gguf", "-q", "rtn:q8_0", "--check-text", text)
    done = command("convert", model, "-o", out, *asked, "--adapter", lora, "--keep-adapters")
    assert done.code == 0, done.err
    assert quality(out)["kld_mean"] < 0.05


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--check-tokens", "3"), 2, "at least 16"),
        (("--max-kld", "-1"), 2, "0 or more"),
        (("--max-kld", "nan"), 2, "0 or more"),
        (("--max-ppl-increase", "much"), 2, "such as 5%"),
        (("--check-text", "nowhere.txt"), 2, "nowhere.txt"),
    ],
)
def test_refusals_before_any_work(
    options: tuple[str, ...], code: int, says: str, convert: Convert, out: Path
) -> None:
    done = convert(*options)
    assert done.code == code, done.err
    assert says in done.err
    assert "quantize" not in done.err
    assert not list(out.parent.iterdir())


def test_a_folder_that_is_no_artifact_is_not_replaced_by_a_rejected_one(
    convert: Convert, out: Path
) -> None:
    mine = out.with_name("small.rejected") / "mine"
    mine.parent.mkdir()
    mine.write_text("something else")
    done = convert("--max-kld", "1e-6")
    assert done.code == 7
    assert "small.rejected" in done.err
    assert mine.read_text() == "something else"
    assert not out.exists()
