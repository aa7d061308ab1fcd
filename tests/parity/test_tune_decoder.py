"""The torch decoder that tuning trains computes what transformers does, and what was stored.

Measured: within 6e-5 of transformers' logits, whose spread is 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models
import torch

from edgellm import forward
from edgellm.artifact import Artifact
from edgellm.conversion import convert
from edgellm.plan import make_plan
from edgellm.quant.dequantize import dequantize
from edgellm.quant.rtn import solve
from edgellm.recipe import make_recipe
from edgellm.source import ModelSource, open_source
from edgellm.tensors import derived
from edgellm.tune import torch_decoder
from edgellm.tune.stored import StoredModel
from edgellm.tune.weights import SourceWeights, StudentWeights

TinyModel = Callable[[str], Path]

TOLERANCE = 2e-4
"""As for the ONNX graph in ``test_forward.py``."""


def logits(source: ModelSource, weights: torch_decoder.Weights, window: list[int]) -> np.ndarray:
    decoder = source.decoder
    with torch.no_grad():
        stream = torch_decoder.embedded(decoder, weights, torch.tensor([window]))
        for index in range(len(decoder.layers)):
            stream = torch_decoder.layer(decoder, index, weights, stream)
        normed = torch_decoder.head_input(decoder, weights, stream)
        head = "token_embd" if decoder.tied_head else "output"
        found: np.ndarray = weights.product(head, normed)[0].numpy()
    if decoder.logit_softcap is not None:
        found = decoder.logit_softcap * np.tanh(found / decoder.logit_softcap)
    return found


TRAINED = [
    name
    for name, tiny in tiny_models.MODELS.items()
    if "moe" not in name
    and name != "mixtral"
    and "moe_intermediate_size" not in tiny.settings
    and not name.startswith("mamba")
]
"""Mixtures of experts and states are not tuned."""


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_source_weights_answer_as_transformers(name: str, tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model(name)))
    weights = SourceWeights.load(source.tensors.values(), source.decoder)
    for length in (100, 1, 7):
        window = tiny_models.some_token_ids(length, seed=length)
        wanted = tiny_models.reference_logits(tiny_model(name), window)
        np.testing.assert_allclose(logits(source, weights, window), wanted, rtol=0, atol=TOLERANCE)


def student_of(folder: Path, artifact: Artifact, quant: str) -> StudentWeights:
    plan = make_plan(make_recipe({"source": str(folder), "quant": quant}))
    stored = StoredModel(plan.layout, plan.source, artifact.path)
    weights = {role: weight for _, found in stored.under("") for role, weight in found.items()}
    assert weights.keys() == plan.source.tensors.keys()
    return StudentWeights(weights, plan.source.decoder, norms_offset=stored.norms_offset)


GGUF = [
    *((name, "q4_0") for name in ("llama", "llama-biased", "qwen2", "qwen3", "gemma3", "gpt2")),
    *(("llama-256", grid) for grid in ("q4_k_m", "q3_k_s", "q2_k", "iq4_xs", "iq3_s")),
]
"""Each way that a family is stored, and each kind of block."""


@pytest.mark.parametrize(("name", "grid"), GGUF)
def test_a_gguf_file_is_read_as_its_own_reader_reads_it(
    name: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The network of what was written, read back by the code that reads any GGUF file."""
    folder = tiny_model(name)
    recipe = make_recipe({"source": str(folder), "quant": f"rtn:{grid}", "format": "gguf"})
    artifact = convert(recipe, tmp_path / "out", threads=1, check=False)
    written = open_source(str(artifact.main), quantized=True)
    window = tiny_models.some_token_ids(40)
    (wanted,) = forward.window_logits(written, [window], threads=1)
    student = student_of(folder, artifact, f"rtn:{grid}")
    found = logits(open_source(str(folder)), student, window)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


ONNX = [
    ("llama-biased", "int4-g32"),
    ("llama-biased", "int8"),
    ("gemma3", "int4-g32-sym"),
    ("gpt2", "int8-dynamic"),
    ("llama-256", "nf4"),
]


@pytest.mark.parametrize(("name", "grid"), ONNX)
def test_an_onnx_folder_is_read_as_it_was_rounded(
    name: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    quant = f"rtn:{grid}"
    recipe = make_recipe({"source": str(folder), "quant": quant, "format": "onnx"})
    artifact = convert(recipe, tmp_path / "out", threads=1, check=False)
    plan = make_plan(recipe)
    grids = {part.role: tensor.grid for tensor in plan.layout.tensors for part in tensor.parts}
    source = plan.source
    rounded = {
        role: derived(ref, lambda rows, grid=grids[role]: dequantize(solve(rows, grid)))
        if len(ref.shape) == 2 and grids[role].kind != "float"
        else ref
        for role, ref in source.tensors.items()
    }
    window = tiny_models.some_token_ids(40)
    (wanted,) = forward.window_logits(replace(source, tensors=rounded), [window], threads=1)
    stored = StoredModel(plan.layout, source, artifact.path)
    weights = {role: weight for _, found in stored.under("") for role, weight in found.items()}
    student = StudentWeights(weights, source.decoder, norms_offset=stored.norms_offset)
    np.testing.assert_allclose(logits(source, student, window), wanted, rtol=0, atol=TOLERANCE)
