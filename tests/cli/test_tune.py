"""``convert --tune`` from the command line: planned, done, recorded, refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm.manifest import read_manifest
from edgellm.tune import planning

from .conftest import Command, TinyModel

torch = pytest.importorskip("torch", reason="torch is not installed")

TEXT = "The quick brown fox jumps over the lazy dog, and 12 apples are 345 oranges. " * 400


@pytest.fixture
def options(tiny_model: TinyModel, tmp_path: Path) -> tuple[object, ...]:
    (text := tmp_path / "text.txt").write_text(TEXT)
    given = ("--format", "gguf", "--quant", "rtn:q4_0", "--tune", 4, "--threads", 1)
    return (tiny_model("llama"), *given, "--calibration", text, "--calibration-tokens", 2048)


def test_what_was_tuned_is_planned_shown_and_recorded(
    command: Command, options: tuple[object, ...], tmp_path: Path
) -> None:
    planned = command("convert", *options, "--dry-run", "--json").json()["tuning"]
    assert planned["settings"]["steps"] == 4
    assert planned["whole"]
    assert planned["settings"]["step_tokens"] >= 4
    done = command("convert", *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "out")
    entry, figures = manifest.artifact.tuning, manifest.measured["tuning"]
    assert entry is not None
    assert entry.settings == planned["settings"]
    assert entry.ids_sha256 == planned["ids_sha256"]
    assert (entry.threads, entry.torch) == (1, torch.__version__)
    assert entry.training_tokens > entry.held_out_tokens > 0
    assert manifest.artifact.recipe["tune"] == 4
    assert figures["kl_after"] < figures["kl_before"]
    assert f"held-out KL {figures['kl_before']:.4g} to {figures['kl_after']:.4g}" in done.err
    assert command("verify", tmp_path / "out").code == 0


def test_the_same_seed_and_threads_give_the_same_bytes(
    command: Command, options: tuple[object, ...], tmp_path: Path
) -> None:
    quick = (*options, "--tune", 2, "--no-check", "--json", "--out")
    made = [command("convert", *quick, tmp_path / name).json() for name in ("a", "b")]
    digests = [each["manifest"]["sha256"] for each in made]
    assert digests[0] == digests[1]


def test_gptq_solves_by_gradients_and_says_so(
    command: Command, options: tuple[object, ...], tmp_path: Path
) -> None:
    """Of as many tokens as it calibrates on; what rounds otherwise takes none."""

    def planned(quant: str) -> Any:
        return command("convert", *options, "--quant", quant, "--dry-run", "--json").json()

    plan = planned("gptq:q4_0")
    settings = plan["tuning"]["settings"]
    assert settings["gradient_tokens"] == 2048
    assert plan["tuning"]["tune_s"] > planned("rtn:q4_0")["tuning"]["tune_s"]
    others = [planned(quant)["tuning"] for quant in ("rtn:q4_0", "imatrix:q4_0")]
    assert {each["settings"]["gradient_tokens"] for each in others} == {0}
    assert planned("awq+gptq:q4_0")["tuning"]["settings"]["gradient_tokens"] == 2048
    shown = command("convert", *options, "--quant", "gptq:q4_0", "--dry-run").out
    assert "codes by gradients of 2048 tokens, then 4 steps" in " ".join(shown.split())
    done = command("convert", *options, "--quant", "gptq:q4_0", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "gradients" in done.err
    artifact = read_manifest(tmp_path / "out").artifact
    assert artifact.tuning is not None
    assert artifact.calibration is not None
    assert artifact.tuning.settings == settings
    assert artifact.calibration.settings["coupled"] == {"damping": 0.5, "block_rows": 64}
    assert command("verify", tmp_path / "out").code == 0


def test_the_solver_reads_what_tuning_does(
    command: Command, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is told how many tokens to read; and it is not spared to save time."""
    monkeypatch.setattr("edgellm.calibration.planning.PATIENCE_S", 1e-6)
    options = (tiny_model("llama"), "--format", "gguf", "--quant", "q4_0", "--dry-run", "--json")

    def planned(*more: object) -> tuple[str, int, bool, int]:
        plan = command("convert", *options, *more).json()
        read, trained = plan["calibration"], plan["tuning"]
        same = read["ids_sha256"] == trained["ids_sha256"]
        gradients = trained["settings"]["gradient_tokens"]
        return plan["recipe"]["quant"], read["tokens"], same, gradients

    quant = "awq+gptq:q4_0"
    assert planned("--tune", 50) == (quant, 50 * 2048 + 8 * 512, True, 16384)
    assert planned("--tune", 2) == (quant, 32768, True, 16384)
    assert planned("--tune", 50, "--calibration-tokens", 2048) == (quant, 2048, False, 2048)


@pytest.mark.parametrize(
    ("quant", "share"), [("q4_0", 1), ("q5_1", 0.5), ("q8_0", 1 / 16), ("int4-g32", 1)]
)
def test_codes_of_more_bits_are_trained_at_lower_rates(
    quant: str, share: float, command: Command, options: tuple[object, ...]
) -> None:
    """By the weights of layers: the head of the first has 8 bits."""
    format = "onnx" if quant.startswith("int4") else "gguf"
    given = (*options, "--format", format, "--quant", f"rtn:{quant}", "--dry-run", "--json")
    settings = command("convert", *given).json()["tuning"]["settings"]
    found = [settings[name] for name in ("rate", "norm_rate", "block_rate")]
    assert found == pytest.approx([share * 7e-4, share * 1e-3, share * 1e-3])


def test_gradients_that_do_not_fit_are_left_out_with_a_note(
    command: Command, options: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = (*options, "--quant", "gptq:q4_0", "--dry-run", "--json")
    fitting = command("convert", *planned).json()
    assert not [note for note in fitting["notes"] if "solved apart" in note]
    monkeypatch.setattr(planning, "gradient_bytes", lambda *_: 1 << 60)
    without = command("convert", *planned).json()
    (note,) = (note for note in without["notes"] if "solved apart" in note)
    assert "1152921504.6 GB of memory" in note
    assert without["tuning"]["settings"]["gradient_tokens"] == 0
    assert without["tuning"]["settings"]["steps"] == 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--quant", "f16"), "no tensor has scales that can move"),
        (("--tune", 0), "at least 1, got 0"),
        (("--calibration", "absent.txt"), "cannot read the text absent.txt"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_work(
    more: tuple[object, ...],
    says: str,
    command: Command,
    options: tuple[object, ...],
    tmp_path: Path,
) -> None:
    done = command("convert", *options, *more, "--out", tmp_path / "out")
    assert done.code == 2
    assert says in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_without_torch_the_extra_is_named(
    command: Command,
    options: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    without = SimpleNamespace(find_spec=lambda name: None if name == "torch" else find(name))
    monkeypatch.setattr(planning.importlib, "util", without)
    done = command("convert", *options, "--out", tmp_path / "out")
    assert done.code == 6
    assert "pip install 'edgellm[calibrate]'" in done.err


def test_memory_decides_how_and_whether(
    command: Command, options: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less of it: layers computed twice, then blocks alone with a note, then a refusal."""

    def planned(nbytes: int) -> Any:
        free = SimpleNamespace(available=nbytes, total=nbytes)
        monkeypatch.setattr("edgellm.plan.psutil.virtual_memory", lambda: free)
        done = command("convert", *options, "--dry-run", "--json")
        return json.loads(done.out)

    most = planned(1 << 40)
    assert (most["tuning"]["whole"], most["tuning"]["recompute"]) == (True, False)
    less = planned(most["tuning"]["memory_bytes"] - 1)
    assert (less["tuning"]["whole"], less["tuning"]["recompute"]) == (True, True)
    blocks = planned(less["tuning"]["memory_bytes"] - 1)
    assert not blocks["tuning"]["whole"]
    assert blocks["tuning"]["settings"]["block_steps"] == 4
    assert any("block by block alone" in note for note in blocks["notes"])
    assert blocks["tuning"]["memory_bytes"] < less["tuning"]["memory_bytes"]
    refused = planned(blocks["tuning"]["memory_bytes"] - 1)
    assert "fewer steps" in refused["error"]["message"]
