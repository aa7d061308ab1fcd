"""Matrices of models that edgellm does not make: experts, unknown names, other quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.profiling.matrices import Counts, Matrix, counted, main_grid, of_checkpoint, of_gguf
from edgellm.quant.ggml_types import NAMED
from edgellm.source.checkpoint import read_checkpoint
from edgellm.source.gguf_file import GgufFile, GgufTensor


def gguf(metadata: dict[str, Any], **shapes: tuple[int, ...]) -> GgufFile:
    """A header without a file; names with ``__`` for points, all in q8_0."""
    kind = NAMED["q8_0"]
    tensors = {}
    for name, shape in shapes.items():
        point = name.replace("__", ".")
        nbytes = int(np.prod(shape)) // kind.block * kind.block_bytes
        tensors[point] = GgufTensor(point, shape, kind, 0, nbytes, Path("none"))
    return GgufFile(Path("none"), 3, metadata, tensors, 0, (Path("none"),))


def test_of_experts_a_token_reads_those_that_it_needs() -> None:
    stored = gguf(
        {"general.architecture": "moe", "moe.expert_count": 8, "moe.expert_used_count": 2},
        token_embd__weight=(100, 64),
        output__weight=(100, 64),
        blk__0__ffn_up_exps__weight=(8, 128, 64),
        blk__0__ffn_gate_inp__weight=(8, 64),
        blk__0__attn_q__weight=(64, 64),
        blk__0__attn_norm__weight=(64,),
    )
    byte = 34 / 32
    assert counted(of_gguf(stored)) == Counts(
        weights=2 * 6400 + 8 * 8192 + 512 + 4096,
        weight_bytes=round((2 * 6400 + 8 * 8192 + 512 + 4096) * byte),
        bytes_per_token=round((64 + 6400 + 2 * 8192 + 512 + 4096) * byte),
        prompt_weights=2 * 8192 + 512 + 4096,
    )


def test_without_a_known_embedding_nobody_says_what_a_token_reads() -> None:
    found = counted(of_gguf(gguf({}, some__weight=(64, 64))))
    assert found == Counts(weights=4096, weight_bytes=4352)
    assert counted([]) == Counts()
    assert main_grid([]) == ""
    many = [Matrix("layer", "q4_k", 10, 1, 1), Matrix("layer", "q6_k", 9, 99, 1)]
    assert main_grid(many) == "q4_k"


@pytest.mark.parametrize("method", ["fp8", "no such method"])
def test_a_checkpoint_quantized_in_another_way_is_not_counted(
    method: str, write_model: Any, tensors: Any
) -> None:
    folder = write_model(tensors)
    checkpoint = read_checkpoint(folder)
    assert of_checkpoint(checkpoint, {"tie_word_embeddings": True}, "here")
    config = {"quantization_config": {"quant_method": method}}
    assert of_checkpoint(checkpoint, config, "here") == []


def test_shards_and_experts_of_a_checkpoint(write_model: Any, tensors: Any) -> None:
    expert = {
        f"model.layers.0.mlp.experts.{number}.up_proj.weight": np.ones((48, 32), np.float32)
        for number in range(4)
    }
    config = {"tie_word_embeddings": True, "num_experts": 4, "num_experts_per_tok": 1}
    whole = read_checkpoint(write_model(tensors | expert, shards=3))
    with_experts = counted(of_checkpoint(whole, config, "here"))
    without = counted(of_checkpoint(read_checkpoint(write_model(tensors, folder="b")), {}, "here"))
    assert without.bytes_per_token is not None
    assert with_experts.bytes_per_token == without.bytes_per_token + 48 * 32 * 4
    # The embedding is the head too, norms are no matrices.
    assert without.weights == sum(each.size for each in tensors.values() if each.ndim > 1)
    assert without.bytes_per_token == without.weight_bytes == 4 * without.weights
