"""Every grid by its name, from the folder to the answer: convert, verify, run, compare."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import reference_logits, some_token_ids

import edgellm
from edgellm.artifact import open_artifact, verify
from edgellm.errors import UnsupportedTarget
from edgellm.export import CONTAINERS, container_named

TinyModel = Callable[[str], Path]

GGUF = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1", "q4_k_m", "q4_k_s",
    "q4_0", "q4_1", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq3_m", "iq3_s",
    "iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
)  # fmt: skip
ONNX = (
    "f32", "f16", "int8", "int8-g64", "int8-g128", "int8-dynamic", "int4-g32", "int4-g64",
    "int4-g128", "int4-g32-sym", "int4-g64-sym", "int4-g128-sym", "nf4",
)  # fmt: skip

MLX = (
    "f32", "f16", "bf16", "int8", "int8-g64", "int8-g128", "int4-g32-min", "int4-g64-min",
    "int4-g128-min", "int4-g32-sym", "int4-g64-sym", "int4-g128-sym",
)  # fmt: skip

NEEDS_IMPORTANCE = ("iq3_xs", "iq3_xxs", *GGUF[GGUF.index("q2_k_s") :])
"""GGUF mixtures that hold where blocks of 256 do not divide the rows, and are refused where they
do: they then need an importance matrix."""

BOUNDS = {
    "f32": 1e-4,
    "f16": 5e-3,
    "bf16": 0.03,
    "int8-dynamic": 0.15,
    "q8": 0.1,
    "int8": 0.1,
    "q6": 0.2,
    "q5": 0.4,
    "q4": 0.7,
    "iq4": 0.7,
    "int4": 0.7,
    "nf4": 0.7,
    "q3": 0.95,
    "iq": 0.95,
    "q2": 1.15,
}
"""How far logits may lie from the original's, as a part of their spread, by the beginning of the
grid's name. About twice what was measured, less for the coarsest: a model drawn at random, without
the slack of a trained one, doubles its error with every bit less. Those of an unrelated model lie
1.41 apart."""

ID_COUNT = 24


def bound_of(quant: str) -> float:
    return next(bound for start, bound in BOUNDS.items() if quant.startswith(start))


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.var(wanted)))


@pytest.fixture(scope="module")
def original(tiny_model: TinyModel) -> Callable[[str], np.ndarray]:
    """transformers' logits of the model, computed once."""
    found: dict[str, np.ndarray] = {}

    def logits(model: str) -> np.ndarray:
        if model not in found:
            found[model] = reference_logits(tiny_model(model), some_token_ids(ID_COUNT))
        return found[model]

    return logits


def error_of(source: Path, out: Path, wanted: np.ndarray, **choices: Any) -> float:
    """Convert, verify and run; the distance of the logits from ``wanted``."""
    choices["quant"] = f"rtn:{choices['quant']}"
    artifact = edgellm.convert(source, out, check=False, threads=1, **choices)
    verify(open_artifact(out))
    module = {"gguf": "llama_cpp", "onnx": "onnxruntime", "mlx": "mlx_lm"}[artifact.container]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    kv_dtype = None if artifact.container == "mlx" else "f32"  # MLX's follows the weights
    with edgellm.open(out, threads=1, context_tokens=64, kv_dtype=kv_dtype) as session:
        answer = session.generate("hello", max_tokens=3, raw=True)
        assert answer.finish_reason in ("length", "stop")
        session.session.trim(0)
        found = session.session.prefill(some_token_ids(ID_COUNT), all_logits=True)
        return relative_error(found, wanted)


def test_no_name_is_missing_or_untried() -> None:
    tried = {"gguf": set(GGUF), "onnx": set(ONNX), "mlx": set(MLX)}
    # What nothing here runs is loaded by other libraries, in test_hf_folder and test_hf_packing.
    runnable = [name for name in CONTAINERS if name != "hf"]
    assert {name: set(container_named(name).grids) for name in runnable} == tried


@pytest.mark.parametrize(
    ("container", "quant"),
    [
        *(("gguf", quant) for quant in GGUF),
        *(("onnx", quant) for quant in ONNX),
        *(("mlx", quant) for quant in MLX),
    ],
)
def test_rows_that_every_block_divides(
    container: str,
    quant: str,
    tiny_model: TinyModel,
    original: Callable[[str], np.ndarray],
    tmp_path: Path,
) -> None:
    source = tiny_model("llama-256")
    if quant in NEEDS_IMPORTANCE:
        with pytest.raises(UnsupportedTarget, match="importance"):
            edgellm.convert(
                source, tmp_path / "out", format=container, quant=f"rtn:{quant}", check=False
            )
        assert not list(tmp_path.iterdir())
        return
    wanted = original("llama-256")
    error = error_of(source, tmp_path / "out", wanted, format=container, quant=quant)
    assert error < bound_of(quant)


@pytest.mark.parametrize("quant", GGUF)
def test_rows_that_blocks_of_256_do_not_divide(
    quant: str, tiny_model: TinyModel, original: Callable[[str], np.ndarray], tmp_path: Path
) -> None:
    wanted = original("llama")
    error = error_of(tiny_model("llama"), tmp_path / "out", wanted, format="gguf", quant=quant)
    assert error < bound_of(quant)


@pytest.mark.parametrize(
    "choices",
    [
        {"format": "gguf", "quant": "q4_0", "embed": "f16", "head": "q8_0"},
        {"format": "gguf", "quant": "q8_0", "embed": "q4_k", "head": "q6_k"},
        {"format": "onnx", "quant": "int4-g64", "embed": "f16", "head": "int4-g32"},
        {"format": "onnx", "quant": "int8", "embed": "int4-g128", "head": "f32"},
        {"format": "onnx", "quant": "int4-g32", "embed": "f32", "head": "nf4"},
        {"format": "onnx", "quant": "int4-g32", "embed": "int8", "head": "int8-dynamic"},
        {"format": "mlx", "quant": "int4-g64-min", "embed": "f16", "head": "int4-g32-sym"},
        {"format": "mlx", "quant": "int8", "embed": "int4-g128-min", "head": "f16"},
    ],
    ids=lambda choices: "-".join(choices.values()),
)
def test_embedding_and_head_apart(
    choices: dict[str, str],
    tiny_model: TinyModel,
    original: Callable[[str], np.ndarray],
    tmp_path: Path,
) -> None:
    out, wanted = tmp_path / "out", original("llama-256")
    error = error_of(tiny_model("llama-256"), out, wanted, **choices)
    assert error < max(bound_of(choices[part]) for part in ("quant", "embed", "head"))
    manifest = open_artifact(out).manifest
    assert manifest is not None
    grids = {tensor.role: tensor.grid for tensor in manifest.artifact.tensors}
    assert grids["token_embd.weight"] == choices["embed"]
    assert grids["output.weight"] == choices["head"]


@pytest.mark.parametrize(
    "choices",
    [
        {"format": "gguf", "quant": "q4_0", "embed": "q8_0"},
        {"format": "gguf", "quant": "q4_0", "head": "q8_0"},
        {"format": "onnx", "quant": "int4-g32"},
        {"format": "onnx", "quant": "int4-g32", "embed": "f32"},
        {"format": "onnx", "quant": "int4-g32", "head": "int4-g32"},
        {"format": "mlx", "quant": "int4-g32-min"},
        {"format": "mlx", "quant": "int4-g32-min", "embed": "int4-g32-sym"},
    ],
    ids=lambda choices: "-".join(choices.values()),
)
def test_a_tied_head_is_stored_once(
    choices: dict[str, str],
    tiny_model: TinyModel,
    original: Callable[[str], np.ndarray],
    tmp_path: Path,
) -> None:
    out, wanted = tmp_path / "out", original("llama-biased")
    error = error_of(tiny_model("llama-biased"), out, wanted, **choices)
    assert error < bound_of("q4")
    manifest = open_artifact(out).manifest
    assert manifest is not None
    places = {
        tensor.arrays
        for tensor in manifest.artifact.tensors
        if tensor.role in ("token_embd.weight", "output.weight")
    }
    assert len(places) == 1


def test_the_bounds_can_be_missed(
    tiny_model: TinyModel, original: Callable[[str], np.ndarray]
) -> None:
    """Logits of the same model for other tokens are further away than any bound."""
    wanted = original("llama-256")
    other = reference_logits(tiny_model("llama-256"), some_token_ids(ID_COUNT, seed=2))
    assert relative_error(other, wanted) > max(BOUNDS.values())
