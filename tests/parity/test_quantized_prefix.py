"""Calibration on the layers that are quantized already: what is seen of them, and what is written.

The other readers are transformers, with the first layer's weights as gguf reads them, and the
artifact itself, opened as a source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models
from test_calibrated_conversion import contents, recipe_of, stored

from edgellm import registry, slabs
from edgellm.calibration import passes, sums
from edgellm.calibration.blocks import EMBEDDING, HEAD, statistics_of
from edgellm.calibration.passes import CalibrationPass
from edgellm.calibration.stored_layers import as_stored
from edgellm.cli.plan_view import plan_facts
from edgellm.conversion import carry_out, convert
from edgellm.errors import UsageError
from edgellm.parallel import one_blas_thread
from edgellm.plan import Plan, make_plan
from edgellm.quant import SOLVERS
from edgellm.quant.statistics import Statistics
from edgellm.recipe import CALIBRATE_ON, load_recipe, save_recipe
from edgellm.slabs import values_of
from edgellm.source import open_source
from edgellm.tensors import stacked_rows

TinyModel = Callable[[str], Path]

WINDOWS = [tiny_models.some_token_ids(length, seed=length) for length in (40, 17, 1, 33)]

TOLERANCE = 2e-4
"""Of the largest value of a Hessian: twice what logits may be off by, as inputs are squared."""


PRODUCTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What transformers calls them, by role."""
ATTENTION = [PRODUCTS[f"attn_{part}"] for part in "qkv"]


def planned(source: Path, quant: str, layers: str = "quantized", container: str = "gguf") -> Plan:
    return make_plan(recipe_of(source, quant, container, calibrate_on=layers))


def inputs_of(model: Any, index: int) -> dict[str, np.ndarray]:
    """What the products of a layer are given, by module; under ``in`` and ``out`` the layer's."""
    import torch

    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        seen.setdefault(name, []).append(values[0].numpy().astype(np.float64))

    layer = model.model.layers[index]
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: keep(name, given[0])
        )
        for name in PRODUCTS.values()
    ]
    hooks.append(
        layer.register_forward_hook(
            lambda _, __, out: keep("out", out[0] if isinstance(out, tuple) else out)
        )
    )
    hooks.append(layer.register_forward_pre_hook(lambda _, given: keep("in", given[0])))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def test_the_next_layer_is_seen_behind_the_quantized_one(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    import torch

    monkeypatch.setattr(passes, "CHUNK_TOKENS", 50)  # several chunks
    monkeypatch.setattr(sums, "STRIP_COLUMNS", 64)  # and strips
    folder = tiny_model("llama")
    plan = planned(folder, "gptq:q4_0")
    made = carry_out(plan, tmp_path / "made", check=False).path
    run = CalibrationPass(plan.source, WINDOWS, threads=2, layers="quantized")
    run.begin()
    run.layer(0)
    run.follow(0, as_stored(plan.source, plan.layout, made))
    found = run.layer(1)

    model = tiny_models.load(folder)
    wanted = inputs_of(model, 1)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(made / "model.gguf").tensors}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for part, name in PRODUCTS.items():
        tensor = read[f"blk.0.{part}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if part in heads:  # llama.cpp pairs the rows that turn together
            pairs = values.reshape(heads[part], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weight = model.model.layers[0].get_submodule(name).weight
        weight.data = torch.from_numpy(values.copy())
    given = inputs_of(model, 1)

    def hessian_of(inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
        counts = np.square(inputs["out"]).mean(axis=1)
        if name not in ATTENTION:
            counts /= np.square(inputs["in"]).mean(axis=1)
        counts **= passes.TOKEN_POWER
        return (inputs[name] * counts[:, None]).T @ inputs[name] / counts.sum()

    for part, name in PRODUCTS.items():
        hessian, of_float = hessian_of(given, name), hessian_of(wanted, name)
        atol = TOLERANCE * hessian.max()
        assert np.abs(of_float - hessian).max() > 10 * atol
        statistics = found[f"blk.1.{part}.weight"]
        np.testing.assert_allclose(statistics.hessian, hessian, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("model", "container", "quant"),
    [
        ("llama-256", "gguf", "gptq:q4_k_m"),
        ("llama-256", "gguf", "awq+gptq:q4_0"),
        ("gemma3", "gguf", "gptq:q4_0"),
        ("gpt2", "gguf", "gptq:q5_1"),
        ("qwen3", "onnx", "gptq:int4-g32"),
        ("llama", "hf", "gptq:int4-g32-sym"),
    ],
)
def test_every_layer_is_solved_for_what_the_written_ones_give(
    model: str, container: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = planned(tiny_model(model), quant, "quantized", container)
    artifact = carry_out(plan, tmp_path / "made", check=False)
    assert artifact.manifest is not None
    entry = artifact.manifest.artifact.calibration
    assert entry is not None
    assert entry.layers == "quantized"
    assert plan.calibration is not None
    assert plan.calibration.text is not None
    source, windows = plan.source, plan.calibration.text.windows
    run = CalibrationPass(source, windows, threads=2, layers="quantized")
    run.begin()
    rounded = as_stored(source, plan.layout, artifact.path)
    found: dict[str, Statistics] = {}
    count = len(source.decoder.layers)
    for index in range(count):
        found |= run.layer(index)
        run.follow(index, rounded)

    found[EMBEDDING if source.decoder.tied_head else HEAD] = run.head()

    # What the written layers give is what the artifact gives, whoever reads it.
    main = artifact.path if container == "hf" else artifact.path / plan.layout.main_file
    if container != "onnx":
        read = open_source(str(main), quantized=True)
        tables = {
            role: ref
            for role, ref in source.tensors.items()
            if role in (EMBEDDING, "position_embd.weight")
        }
        read = replace(read, tensors={**read.tensors, **tables})
        other = CalibrationPass(read, windows, threads=2)
        other.begin()
        for index in range(count):
            other.pass_by(index)
        wanted, got = (each.stream.read(0, run.tokens) for each in (other, run))
        scale = np.abs(wanted).max(axis=1, keepdims=True)
        # Of GPTQ's folders values are read in float16, as other readers do.
        atol = 5e-3 if container == "hf" else 1e-4
        np.testing.assert_allclose(got / scale, wanted / scale, rtol=0, atol=atol)

    if plan.recipe.transforms:  # weights and statistics are scaled
        return
    solve = registry.attribute(SOLVERS[plan.recipe.solver].attribute)
    solved = 0
    for tensor in plan.layout.tensors:
        statistics = statistics_of(tensor, found)
        if statistics is None:
            continue
        rows = stacked_rows(tensor.parts, 0, tensor.rows)
        with one_blas_thread():
            wanted = values_of(solve(rows, tensor.grid, statistics))
        np.testing.assert_array_equal(stored(artifact, tensor), wanted)
        solved += 1
    assert solved >= 4 * count


def test_the_same_bytes_whatever_the_threads_slabs_and_place_of_the_stream(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = planned(tiny_model("llama-256"), "gptq:q4_k_m").recipe
    one = convert(recipe, tmp_path / "one", threads=1, check=False)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 70_000)
    spooled = {**CalibrationPass.__init__.__kwdefaults__, "budget_bytes": 0}
    monkeypatch.setattr(CalibrationPass.__init__, "__kwdefaults__", spooled)
    three = convert(recipe, tmp_path / "three", threads=3, check=False)
    assert contents(one.path) == contents(three.path)
    assert one.manifest is not None
    assert three.manifest is not None
    assert one.manifest.sha256 == three.manifest.sha256


def test_a_pass_goes_on_from_a_saved_stream(tiny_model: TinyModel, tmp_path: Path) -> None:
    """In a file; in memory it is a conversion that is killed."""
    plan = planned(tiny_model("llama"), "gptq:q4_0")
    made = carry_out(plan, tmp_path / "made", check=False).path
    rounded = as_stored(plan.source, plan.layout, made)
    spool = tmp_path / "spool"
    spool.mkdir()

    def begun() -> CalibrationPass:
        return CalibrationPass(
            plan.source, WINDOWS, layers="quantized", spool=spool, budget_bytes=0
        )

    first = begun()
    first.begin()
    first.pass_by(0)
    first.follow(0, rounded)
    file = first.save(spool)
    wanted = first.layer(1)
    second = begun()
    second.resume(1, file)
    found = second.layer(1)
    for role, statistics in wanted.items():
        assert statistics.hessian.tobytes() == found[role].hessian.tobytes()


@pytest.mark.parametrize(
    ("quant", "fields", "says"),
    [
        ("imatrix:q4_0", {}, "imatrix cannot make good .* --quant gptq:q4_0"),
        ("awq:q4_0", {}, r"imatrix cannot make good .* --quant awq\+gptq:q4_0"),
        ("rtn:q4_0", {"calibration_tokens": None}, "calibrate_on is for solvers"),
    ],
)
def test_solvers_that_cannot_heed_it_are_refused(
    quant: str, fields: dict[str, Any], says: str, tiny_model: TinyModel
) -> None:
    recipe = recipe_of(tiny_model("llama"), quant, calibrate_on="quantized")
    with pytest.raises(UsageError, match=says):
        make_plan(msgspec.structs.replace(recipe, **fields))


def test_it_is_in_the_plan_and_in_a_saved_recipe(tiny_model: TinyModel, tmp_path: Path) -> None:
    plans = [planned(tiny_model("llama"), "gptq:q4_0", layers) for layers in CALIBRATE_ON]
    assert [plan_facts(plan)["calibration"]["layers"] for plan in plans] == [*CALIBRATE_ON]
    as_float, quantized = (plan.calibration.cost for plan in plans if plan.calibration)
    assert quantized.disk_bytes == as_float.disk_bytes
    assert quantized.memory_bytes == as_float.memory_bytes
    assert quantized.seconds > as_float.seconds
    plain, plan = plans
    save_recipe(plan.recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml", {}) == plan.recipe
    assert plain.recipe.choices().keys() == plan.recipe.choices().keys() - {"calibrate_on"}
