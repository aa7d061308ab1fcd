"""The mlx container against the real mlx-lm: it loads the folder, and computes what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

import edgellm
from edgellm.errors import UnsupportedTarget
from edgellm.manifest import read_manifest
from edgellm.plan import make_plan
from edgellm.quant import SOLVERS, rtn
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS as GRIDS_BY_NAME
from edgellm.recipe import Recipe
from edgellm.source import open_source

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

TinyModel = Callable[[str], Path]

GRIDS = ("int4-g32-min", "int4-g32-sym", "int8")
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2")
"""Families that have a graph in mlx-lm that is known."""

REFUSED = {
    "llama-yarn-odd": "truncate: false",
    "qwen3-biased": "biases",
    "gpt2-untied": "tied",
    **{
        name: "is not understood"
        for name, tiny in tiny_models.MODELS.items()
        if tiny_models.model_type_of(tiny) not in KNOWN
    },
}
EXPRESSED = [name for name in tiny_models.MODELS if name not in REFUSED]
TOKENS = 40
WITHIN = {"mistral": 8, "qwen2-window": 6}
"""Models whose windows mlx-lm passes over: tokens that it is right for."""


def converted(source: Path, out: Path, quant: str, **fields: Any) -> Path:
    edgellm.convert(source, out, format="mlx", quant=quant, check=False, threads=1, **fields)
    return out


def arrays_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = mx.load(str(folder / "model.safetensors"))
    return found


def values(arrays: dict[str, Any], module: str, settings: dict[str, Any]) -> np.ndarray:
    """The weight of ``module`` as MLX dequantizes it, in float32."""
    words, *by_group = (arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
    wide = (each.astype(mx.float32) for each in by_group)
    group, bits = settings["group_size"], settings["bits"]
    return np.array(mx.dequantize(words, *wide, group_size=group, bits=bits))


@pytest.mark.parametrize("grid", GRIDS)
def test_mlx_reads_the_values_that_were_solved(
    grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    folder = converted(source, tmp_path / "out", f"rtn:{grid}")
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    arrays = arrays_of(folder)
    plan = make_plan(Recipe(source=str(source), format="mlx", quant=f"rtn:{grid}"), threads=1)
    quantized = [tensor for tensor in plan.layout.tensors if tensor.grid.kind != "float"]
    assert len(quantized) == sum(name.endswith(".scales") for name in arrays)
    for tensor in quantized:
        module = tensor.name.removesuffix(".weight")
        found = values(arrays, module, settings.get(module, settings))
        wanted = dequantize(rtn.solve(tensor.parts[0].load(), tensor.grid))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", EXPRESSED)
def test_mlx_lm_computes_what_transformers_does(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With and without a cache, past every window that it computes."""
    source = tiny_model(name)
    folder = converted(source, tmp_path / "out", "f32")
    ids = tiny_models.some_token_ids(WITHIN.get(name, TOKENS))
    wanted = logits_with_embedding_scale_of_bf16(source, ids)
    model, _ = mlx_lm.load(str(folder))
    assert difference(np.array(model(mx.array([ids])))[0], wanted) < 1e-4
    cache = make_prompt_cache(model)
    pieces = [np.array(model(mx.array([part]), cache=cache))[0] for part in (ids[:5], ids[5:])]
    assert difference(np.concatenate(pieces), wanted) < 1e-4


@pytest.mark.parametrize("name", WITHIN)
def test_a_window_that_mlx_lm_passes_over_caps_the_context(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = converted(tiny_model(name), tmp_path / "out", "f32")
    manifest = read_manifest(folder)
    assert manifest.artifact.model.context_length == WITHIN[name]
    assert any("no sliding window" in note for note in manifest.artifact.notes)
    model, _ = mlx_lm.load(str(folder))
    ids = tiny_models.some_token_ids(TOKENS)
    wanted = tiny_models.reference_logits(tiny_model(name), ids)
    assert difference(np.array(model(mx.array([ids])))[0], wanted) > 1e-3  # else why cap it


@pytest.mark.parametrize(("name", "said"), REFUSED.items())
def test_what_mlx_lm_computes_otherwise_is_refused_by_name(
    name: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTarget, match=said):
        converted(tiny_model(name), tmp_path / "out", "f32")


def logits_with_embedding_scale_of_bf16(source: Path, ids: list[int]) -> np.ndarray:
    """transformers' in float32, but for the rounding that mlx-lm's Gemma has at every dtype."""
    import torch

    model = tiny_models.load(source)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = embedding.embed_scale.to(torch.bfloat16).float()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference, by the spread of the wanted logits."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.var(wanted)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mlx_lm_computes_with_the_values_that_were_solved(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """transformers with what MLX reads in the place of the model's own weights."""
    import torch

    source = tiny_model(name)
    folder = converted(source, tmp_path / "out", "rtn:int4-g32-min")
    model = tiny_models.load(source)
    arrays = arrays_of(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    with torch.no_grad():
        for path, module in model.named_modules():
            stored = path.replace("transformer.", "model.")
            if f"{stored}.scales" in arrays:
                rounded = torch.from_numpy(values(arrays, stored, settings.get(stored, settings)))
                turned = module.weight.shape != rounded.shape or "c_proj" in path  # Conv1D
                module.weight.copy_(rounded.T if turned else rounded)
    ids = tiny_models.some_token_ids(TOKENS)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    loaded, _ = mlx_lm.load(str(folder))
    found = np.array(loaded(mx.array([ids])).astype(mx.float32))[0]
    assert difference(found, wanted) < 2e-2  # f16
    assert difference(tiny_models.reference_logits(source, ids), wanted) > 4e-2


def test_any_solver_and_a_grid_of_its_own_for_a_tensor(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    errors = {}
    ids = tiny_models.some_token_ids(40)
    wanted = tiny_models.reference_logits(source, ids)
    for solver in ("rtn", "gptq"):
        fields = {} if solver == "rtn" else {"calibration_tokens": 1024}
        folder = converted(
            source, tmp_path / solver, f"{solver}:int4-g32-min",
            tensor_grids={"blk.*.ffn_down.weight": "int8"}, **fields,
        )  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        down = config["quantization"]["model.layers.0.mlp.down_proj"]
        assert down == {"group_size": 32, "bits": 8, "mode": "affine"}
        loaded, _ = mlx_lm.load(str(folder))
        found = np.array(loaded(mx.array([ids])).astype(mx.float32))[0]
        errors[solver] = float(np.mean((found - wanted) ** 2) / np.var(wanted))
    assert errors.keys() <= SOLVERS.keys()
    assert 0 < errors["gptq"] < 0.5
    assert 0 < errors["rtn"] < 0.5
    assert errors["gptq"] != errors["rtn"]


def test_scales_have_the_dtype_of_the_sources_weights(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    half = converted(source, tmp_path / "bf16", "bf16")
    folder = converted(half, tmp_path / "out", "int4-g32-min")
    arrays = arrays_of(folder)
    assert {str(each.dtype) for each in arrays.values()} == {"mlx.core.uint32", "mlx.core.bfloat16"}
    assert open_source(str(half)).decoder.layers


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("q4_1", "int4-g32-min"),
        ("int4-g32", "-min"),
        ("q4_k_m", "--format gguf"),
        ("q5_9", "no grid of that name"),
        ("nf4", "integers with a scale and a bias"),
        ("int4-g128-min", "do not divide"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_with_what_it_can(
    quant: str, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedTarget, edgellm.errors.UnknownGrid), match=said):
        converted(tiny_model("llama"), tmp_path / "out", quant)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"embed": "int8", "head": "int4-g32-sym"},
        {"head": "int8", "tensor_grids": {"token_embd.weight": "int4-g32-sym"}},
    ],
)
def test_two_grids_for_one_table_are_refused(
    fields: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(edgellm.errors.UsageError, match="cannot be both"):
        converted(tiny_model("llama-biased"), tmp_path / "out", "int4-g32-min", **fields)


def test_the_head_that_is_the_embedding_takes_the_grid_asked_for(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = converted(tiny_model("llama-biased"), out, "int4-g32-min", head="int4-g32-sym")
    tensors = {tensor.role: tensor.grid for tensor in read_manifest(folder).artifact.tensors}
    assert tensors["token_embd.weight"] == "int4-g32-sym"
    assert "output.weight" not in tensors


@pytest.mark.parametrize("group", [32, 64, 128])
def test_plain_rounding_lies_nearer_than_what_mlx_quantizes(group: int) -> None:
    rows = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)
    grid = GRIDS_BY_NAME[f"int4-g{group}-min"]
    ours = dequantize(rtn.solve(rows, grid))
    theirs = np.array(
        mx.dequantize(*mx.quantize(mx.array(rows), group, 4), group_size=group, bits=4)
    )
    assert np.mean((ours - rows) ** 2) < 0.95 * np.mean((theirs - rows) ** 2)
