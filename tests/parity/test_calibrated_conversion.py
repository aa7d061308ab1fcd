"""Conversion by calibrated solvers: the file holds what the solver gave, and that is better."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from edgellm import registry, slabs
from edgellm.calibration import running
from edgellm.calibration.blocks import statistics_of
from edgellm.calibration.passes import CalibrationPass
from edgellm.conversion import carry_out, convert
from edgellm.errors import UsageError
from edgellm.export.layout import OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.manifest import Artifact, read_manifest
from edgellm.plan import Plan, make_plan
from edgellm.quant import SOLVERS
from edgellm.quant.statistics import Statistics
from edgellm.recipe import Recipe
from edgellm.slabs import output_power, values_of
from edgellm.tensors import stacked_rows

TinyModel = Callable[[str], Path]

TOKENS = 1024


def recipe_of(source: Path, quant: str, container: str = "gguf", **fields: Any) -> Recipe:
    return Recipe(
        source=str(source), format=container, quant=quant, calibration_tokens=TOKENS, **fields
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def statistics_by_role(plan: Plan) -> dict[str, Statistics]:
    assert plan.calibration is not None
    run = CalibrationPass(plan.source, plan.calibration.text.windows, threads=1)
    run.begin()
    found: dict[str, Statistics] = {}
    for index in range(len(plan.source.decoder.layers)):
        found |= run.layer(index)
    head = "token_embd.weight" if plan.source.decoder.tied_head else "output.weight"
    return {**found, head: run.head()}


def stored(artifact: Artifact, tensor: OutputTensor) -> np.ndarray:
    """The values of a tensor as they are in the file, by the packer's inverse."""
    parts = {}
    for array in tensor.arrays:
        raw = np.fromfile(
            artifact.path / array.file, np.uint8, count=array.nbytes, offset=array.offset
        )
        parts[array.component] = raw.reshape(array.rows, array.row_bytes)
    return values_of(PACKERS[tensor.packer].unpack(parts, tensor.grid, tensor.columns))


@pytest.mark.parametrize(
    ("model", "container", "quant"),
    [
        ("llama-256", "gguf", "gptq:q4_k_m"),
        ("llama", "gguf", "gptq:q4_0"),
        ("gemma3", "gguf", "imatrix:q4_0"),
        ("llama", "onnx", "gptq:int4-g32-sym"),
    ],
)
def test_the_file_holds_what_the_solver_gave_and_it_beats_rounding(
    model: str, container: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = make_plan(recipe_of(tiny_model(model), quant, container))
    artifact = carry_out(plan, tmp_path / "out", check=False)
    assert artifact.manifest is not None
    found = statistics_by_role(plan)
    solve = registry.attribute(SOLVERS[plan.recipe.solver].attribute)
    plain = registry.attribute(SOLVERS["rtn"].attribute)
    noted = artifact.manifest.measured["calibration"]["output_error_by_tensor"]
    solved = 0
    for tensor in plan.layout.tensors:
        statistics = statistics_of(tensor, found)
        if statistics is None:
            continue
        rows = stacked_rows(tensor.parts, 0, tensor.rows)
        values = stored(artifact, tensor)
        np.testing.assert_array_equal(values, values_of(solve(rows, tensor.grid, statistics)))
        ours = output_power(values - rows, statistics)
        theirs = output_power(values_of(plain(rows, tensor.grid, None)) - rows, statistics)
        assert ours <= theirs, tensor.name
        error = np.sqrt(ours / output_power(rows, statistics))
        assert noted[tensor.name] == pytest.approx(error, rel=1e-3)
        solved += 1
    assert solved >= 4 * len(plan.source.decoder.layers)
    entry = artifact.manifest.artifact.calibration
    assert entry is not None
    assert (entry.tokens, entry.text, entry.solver) == (TOKENS, "builtin", plan.recipe.solver)


@pytest.mark.parametrize(
    ("container", "quant"), [("gguf", "gptq:q4_k_m"), ("onnx", "gptq:int4-g32-sym")]
)
def test_the_same_bytes_whatever_the_threads_and_slabs(
    container: str,
    quant: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(tiny_model("llama-256"), quant, container)
    one = convert(recipe, tmp_path / "one", threads=1, check=False)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 70_000)
    three = convert(recipe, tmp_path / "three", threads=3, check=False)
    assert contents(one.path) == contents(three.path)
    assert one.manifest is not None
    assert three.manifest is not None
    assert one.manifest.sha256 == three.manifest.sha256


KILLED = """
import os, signal, sys
from pathlib import Path
from edgellm.calibration import running
from edgellm.conversion import convert
from edgellm.recipe import Recipe
source, out, quant, save = sys.argv[1:]
running.SAVE_SECONDS = float(save)
finish = running._Run._finish
def killed(self, block, *rest):
    finish(self, block, *rest)
    if block.name == "layer 1":
        os.kill(os.getpid(), signal.SIGKILL)
running._Run._finish = killed
convert(
    Recipe(source=source, format="gguf", quant=quant, calibration_tokens=1024), Path(out),
    check=False,
)
"""


@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_a_killed_run_goes_on_where_it_was(
    save_seconds: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With the hidden states saved, and without: then they are computed again."""
    source, out = tiny_model("llama"), tmp_path / "made" / "out"
    out.parent.mkdir()
    recipe = recipe_of(source, "gptq:q4_0")
    command = [sys.executable, "-c", KILLED, str(source), str(out), "gptq:q4_0", str(save_seconds)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = out.parent.iterdir()
    assert left.name.endswith(".partial")
    assert len(list((left / ".resume").glob("stream-*"))) == (0 if save_seconds else 1)
    whole = convert(recipe, tmp_path / "whole", check=False)
    resumed = convert(recipe, out, check=False)
    assert resumed.manifest is not None
    assert whole.manifest is not None
    assert resumed.manifest.measured["calibration"]["resumed_after_blocks"] == 3
    assert contents(resumed.path) == contents(whole.path)
    assert resumed.manifest.sha256 == whole.manifest.sha256
    of_whole = whole.manifest.measured["calibration"]["output_error_by_tensor"]
    assert resumed.manifest.measured["calibration"]["output_error_by_tensor"] == of_whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not list(out.glob("**/.resume"))


def test_a_stopped_run_is_kept_for_the_same_conversion_alone(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny_model("llama"), tmp_path / "out"
    finish = running._Run._finish

    def stop(run: Any, block: Any, *rest: Any) -> None:
        finish(run, block, *rest)
        if block.name == "layer 0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running._Run, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe_of(source, "imatrix:q4_0"), out, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    made = convert(recipe_of(source, "imatrix:q5_0"), out, check=False)
    assert made.manifest is not None
    assert made.manifest.measured["calibration"]["resumed_after_blocks"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verified = read_manifest(out)
    assert verified.artifact.recipe["quant"] == "imatrix:q5_0"


def test_calibration_that_nothing_would_heed_is_refused(tiny_model: TinyModel) -> None:
    source = tiny_model("llama")
    with pytest.raises(UsageError, match="gptq:q4_0"):
        make_plan(recipe_of(source, "rtn:q4_0"))
    with pytest.raises(UsageError, match="stay floats"):
        make_plan(recipe_of(source, "gptq:f16"))


def test_the_default_solver_follows_bits_and_time(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama")

    def planned(quant: str) -> Plan:
        return make_plan(Recipe(source=str(source), format="gguf", quant=quant))

    quick = planned("q4_0")
    assert quick.recipe.quant == "gptq:q4_0"
    assert any("rtn:q4_0" in reason for reason in quick.reasons)
    for bits in ("q8_0", "f16"):
        assert planned(bits).recipe.quant == bits
        assert planned(bits).calibration is None
    monkeypatch.setattr("edgellm.calibration.planning.PATIENCE_S", 1e-6)
    slow = planned("q4_0")
    assert slow.recipe.quant == "rtn:q4_0"
    assert slow.calibration is None
    assert any("--quant gptq:q4_0" in reason for reason in slow.reasons)
