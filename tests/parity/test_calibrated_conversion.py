"""Conversion by calibrated solvers: the file holds what the solver gave, and that is better."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import edgellm
from edgellm import registry, slabs
from edgellm.artifact import Artifact
from edgellm.calibration import running
from edgellm.calibration.blocks import statistics_of
from edgellm.calibration.passes import TOKEN_POWER, CalibrationPass
from edgellm.conversion import carry_out, convert
from edgellm.errors import UsageError
from edgellm.export.layout import OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.manifest import read_manifest
from edgellm.parallel import one_blas_thread
from edgellm.plan import Plan, make_plan
from edgellm.quant import SOLVERS, imatrix
from edgellm.quant.imatrix_file import HEAD, read_imatrix, write_imatrix
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
    assert plan.calibration.text is not None
    run = CalibrationPass(
        plan.source,
        plan.calibration.text.windows,
        threads=1,
        importance_only=plan.calibration.needs != "hessian",
        weighs=plan.calibration.weighs,
    )
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
        with one_blas_thread():
            wanted = values_of(solve(rows, tensor.grid, statistics))
        np.testing.assert_array_equal(values, wanted)
        ours = output_power(values - rows, statistics)
        theirs = output_power(values_of(plain(rows, tensor.grid, None)) - rows, statistics)
        assert ours <= theirs, tensor.name
        error = output_power(values - rows, statistics) / output_power(rows, statistics)
        assert noted[tensor.name] == pytest.approx(error**0.5, rel=1e-3)
        solved += 1
    assert solved >= 4 * len(plan.source.decoder.layers)
    entry = artifact.manifest.artifact.calibration
    assert entry is not None
    assert (entry.tokens, entry.text, entry.solver) == (TOKENS, "builtin", plan.recipe.solver)
    assert entry.settings.keys() == {plan.recipe.solver, *plan.recipe.transforms}
    assert entry.token_power == (TOKEN_POWER if plan.calibration.weighs else 0)
    if plan.recipe.solver == "gptq":
        assert entry.settings["gptq"] == {"damping": 0.01, "sweeps": 2}


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
source, out, quant, save, layers = sys.argv[1:]
running.SAVE_SECONDS = float(save)
finish = running._Run._finish
def killed(self, block, *rest):
    finish(self, block, *rest)
    if block.name == "layer 1":
        os.kill(os.getpid(), signal.SIGKILL)
running._Run._finish = killed
convert(
    Recipe(
        source=source, format="gguf", quant=quant, calibration_tokens=1024, calibrate_on=layers
    ),
    Path(out), check=False,
)
"""


@pytest.mark.parametrize("layers", ["float", "quantized"])
@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_a_killed_run_goes_on_where_it_was(
    save_seconds: float, layers: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With the hidden states saved, and without: then they are computed again."""
    source, out = tiny_model("llama"), tmp_path / "made" / "out"
    out.parent.mkdir()
    recipe = recipe_of(source, "gptq:q4_0", calibrate_on=layers)
    command = [sys.executable, "-c", KILLED, str(source), str(out), "gptq:q4_0", str(save_seconds)]
    done = subprocess.run([*command, layers], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = out.parent.iterdir()
    assert left.name.endswith(".partial")
    saved = {file.name for file in (left / ".resume").glob("*-before-*")}
    assert saved == (set() if save_seconds else {"stream-before-2"})
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
    assert quick.recipe.quant == "awq+gptq:q4_0"
    assert any("rtn:q4_0" in reason for reason in quick.reasons)
    assert any("fit only beside --quant gptq:q4_0" in reason for reason in quick.reasons)
    for bits in ("q8_0", "f16"):
        assert planned(bits).recipe.quant == bits
        assert planned(bits).calibration is None
    monkeypatch.setattr("edgellm.calibration.planning.PATIENCE_S", 1e-6)
    slow = planned("q4_0")
    assert slow.recipe.quant == "rtn:q4_0"
    assert slow.calibration is None
    assert any("--quant awq+gptq:q4_0" in reason for reason in slow.reasons)


@pytest.mark.parametrize(
    ("asked", "resolved", "gathered"),
    [
        ("awq:q4_0", "awq+imatrix:q4_0", "importance"),
        ("awq+rtn:q4_0", "awq+rtn:q4_0", "importance"),
        ("awq+gptq:q4_0", "awq+gptq:q4_0", "hessian"),
    ],
)
def test_awq_ends_with_the_search_that_clips_and_asks_for_no_more_than_it_needs(
    asked: str, resolved: str, gathered: str, tiny_model: TinyModel
) -> None:
    plan = make_plan(recipe_of(tiny_model("llama"), asked))
    assert plan.recipe.quant == resolved
    assert plan.calibration is not None
    assert (plan.calibration.needs, plan.calibration.weighs) == (gathered, True)
    said = [reason for reason in plan.reasons if "awq's clipping" in reason]
    assert len(said) == (asked != resolved)


MEASURED = """
import sys
from pathlib import Path
from edgellm.conversion import carry_out
from edgellm.hardware import peak_memory_bytes
from edgellm.plan import make_plan
from edgellm.recipe import Recipe
recipe = Recipe(source=sys.argv[1], format="gguf", quant=sys.argv[3], calibration_tokens=2048)
plan = make_plan(recipe, threads=2)
carry_out(plan, Path(sys.argv[2]), check=False)
print(plan.peak_memory_bytes, peak_memory_bytes())
"""


@pytest.fixture(scope="module")
def wide_model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose Hessians outweigh the program, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model("llama-256"), folder)
    config = json.loads((folder / "config.json").read_text())
    hidden, ffn = 512, 3072
    config |= {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)

    layer, vocab = "model.layers.0", config["vocab_size"]
    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        **{f"{layer}.self_attn.{part}_proj.weight": matrix(hidden, hidden) for part in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": matrix(ffn, hidden),
        f"{layer}.mlp.up_proj.weight": matrix(ffn, hidden),
        f"{layer}.mlp.down_proj.weight": matrix(hidden, ffn),
        f"{layer}.input_layernorm.weight": np.ones(hidden, np.float32),
        f"{layer}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
    }
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_memory_is_what_the_plan_says(wide_model: Path, tmp_path: Path) -> None:
    """Measured at 768 x 3072 and 1024 x 4096 too: 0.96 and 1.04 of the plan."""
    command = [sys.executable, "-c", MEASURED, str(wide_model), str(tmp_path / "out"), "gptq:q4_0"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    planned, measured = map(int, answer.stdout.split())
    assert 0.85 * planned <= measured <= 1.15 * planned


def test_adapters_are_calibrated_as_merged(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The same bytes as of the model that they were merged into before."""
    peft = pytest.importorskip("peft")
    import peft_adapters

    source = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = peft_adapters.make_adapter(source, config, tmp_path / "adapter")
    merged = edgellm.merge(source, tmp_path / "merged", [adapter.folder])
    digests = []
    for folder, adapters in ((source, (str(adapter.folder),)), (merged.path, ())):
        recipe = recipe_of(folder, "gptq:q4_0", adapters=adapters)
        made = convert(recipe, tmp_path / f"made-{len(digests)}", check=False)
        assert made.manifest is not None
        digests.append({each.name: each.sha256 for each in made.manifest.artifact.tensors})
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("name", "format", "grid"),
    [("lfm2", "gguf", "q4_0"), ("mamba", "onnx", "int4-g32"), ("qwen2_moe", "gguf", "q4_0")],
)
def test_nothing_is_missed_of_matrices_that_stay_floats(
    name: str, format: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Convolutions, steps of states, routers."""
    file = tmp_path / "importance.gguf"
    recipe = Recipe(
        source=str(tiny_model(name)),
        format=format,
        quant=f"imatrix:{grid}",
        calibration_tokens=2048,
    )
    convert(recipe, tmp_path / "solved", check=False, save_imatrix=file)
    again = Recipe(source=recipe.source, format=format, quant=f"imatrix:{grid}", imatrix=str(file))
    calibration = make_plan(again).calibration
    assert calibration is not None
    assert calibration.notes == ()
    importance = {
        role: values for role, values in read_imatrix(file).importance.items() if "blk.0" in role
    }
    write_imatrix(file, importance, tokens=9, chunk_tokens=9)
    (note,) = make_plan(again).calibration.notes  # type: ignore[union-attr]
    assert "says nothing about blk.1." in note
    assert not any(part in note for part in ("conv.weight", "conv1d", "ssm_dt", "ffn_gate_inp"))


def test_importance_is_saved_and_taken_in_place_of_a_text(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = tmp_path / "importance.gguf"
    recipe = recipe_of(tiny_model("gemma3"), "gptq:q4_0")
    convert(recipe, tmp_path / "solved", check=False, save_imatrix=file)
    given = read_imatrix(file)
    plan = make_plan(Recipe(source=recipe.source, format="gguf", quant="q4_0", imatrix=str(file)))
    assert plan.recipe.quant == "imatrix:q4_0"
    found = statistics_by_role(make_plan(recipe))
    artifact = carry_out(plan, tmp_path / "weighed", check=False)
    names = {role: HEAD if role == "token_embd.weight" else role for role in found}
    assert given.importance.keys() == set(names.values())
    for tensor in plan.layout.tensors:
        if (statistics := statistics_of(tensor, found)) is None:
            continue
        importance = given.importance[names[tensor.role]]
        np.testing.assert_allclose(importance, statistics.mean_squares, rtol=1e-5)
        rows = stacked_rows(tensor.parts, 0, tensor.rows)
        wanted = imatrix.solve(rows, tensor.grid, imatrix.Importance(importance))
        np.testing.assert_array_equal(stored(artifact, tensor), values_of(wanted))
    assert artifact.manifest is not None
    entry = artifact.manifest.artifact.calibration
    assert entry is not None
    assert (entry.imatrix, entry.text) == (file.name, "")
    for quant, more, message in (
        ("gptq:q4_0", {}, "imatrix:q4_0"),
        ("imatrix:q4_0", {"calibration": "builtin"}, "leave one"),
        ("rtn:q4_0", {}, "imatrix"),
    ):
        with pytest.raises(UsageError, match=message):
            make_plan(
                Recipe(source=recipe.source, format="gguf", quant=quant, imatrix=str(file), **more)
            )
    with pytest.raises(UsageError, match="no importance to save"):
        convert(
            Recipe(source=recipe.source, format="gguf", quant="rtn:q4_0"),
            tmp_path / "plain",
            save_imatrix=file,
        )
