"""Matrices of models that edgellm does not make: experts, graphs of others, unknown names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgellm.errors import SourceError
from edgellm.profiling.matrices import Counts, Matrix, counted, main_grid, of_checkpoint, of_gguf
from edgellm.profiling.onnx_matrices import data_files, of_graph, read_graph
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


def graph(nodes: list[Any], **arrays: tuple[Any, int]) -> onnx.ModelProto:
    """A graph of ``nodes`` and zeros of a shape and type by name."""
    initializers = []
    for name, (shape, kind) in arrays.items():
        size = int(np.prod(shape))
        packed = kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        width = 0.5 if packed else onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        raw = bytes(int(np.ceil(size * width)))
        initializers.append(onnx.helper.make_tensor(name, kind, shape, raw, raw=True))
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], initializers))


node = onnx.helper.make_node
FLOAT, HALF, BYTE, NIBBLE = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.UINT4,
)


def test_a_graph_that_quantizes_its_head_apart() -> None:
    found = of_graph(
        graph(
            [
                node("Gather", ["embed", "ids"], ["x"]),
                node("MatMul", ["x", "up"], ["y"]),
                node("RotaryEmbedding", ["y", "p", "cos_cache", "sin_cache"], ["z"]),
                node("Where", ["mask", "z", "y"], ["w"]),
                node("MatMulNBits", ["w", "q", "s", "", "", "bias"], ["logits"],
                     N=100, K=64, bits=4, block_size=32),
            ],
            embed=((100, 64), HALF), up=((64, 48), FLOAT), cos_cache=((256, 16), FLOAT),
            sin_cache=((256, 16), FLOAT), mask=((256, 256), onnx.TensorProto.BOOL),
            q=((100, 2, 16), BYTE), s=((200,), FLOAT), bias=((100,), FLOAT),
        ),
        vocab_size=100,
    )  # fmt: skip
    assert set(found) == {
        Matrix("table", "float16", 6400, 12800, 100),
        Matrix("layer", "float", 3072, 12288, 64),
        Matrix("head", "int4-g32", 6400, 3200 + 800, 100),
    }
    assert counted(found).bytes_per_token == 128 + 12288 + 4000


def test_a_graph_with_a_tied_and_rounded_embedding() -> None:
    model = graph(
        [
            node("GatherBlockQuantized", ["q4", "ids", "s4"], ["x"], bits=4, block_size=32),
            node("GatherBlockQuantized", ["nibbles", "ids", "s4"], ["v"], block_size=32),
            node("DequantizeLinear", ["eight", "scale"], ["d"]),
            node("MatMulNBits", ["x", "codes", "s4"], ["logits"],
                 N=100, K=64, bits=4, block_size=32),
        ],
        q4=((100, 32), BYTE), codes=((100, 2, 16), BYTE), nibbles=((100, 64), NIBBLE),
        s4=((100, 2), FLOAT), eight=((64, 48), onnx.TensorProto.INT8), scale=((48,), FLOAT),
    )  # fmt: skip
    # The same bytes of a file beside the graph, as two initializers.
    for tensor in model.graph.initializer:
        if tensor.name in ("q4", "codes"):
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "w.bin"), ("offset", "64"), ("length", "3200")):
                tensor.external_data.add(key=key, value=value)
    assert data_files(model) == {"w.bin"}
    assert set(of_graph(model, vocab_size=100)) == {
        Matrix("head", "int4-g32", 6400, 4000, 100),
        Matrix("table", "int4-g32", 6400, 4000, 100),
        Matrix("layer", "int8", 3072, 3072 + 192, 64),
    }


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(SourceError, match="not an ONNX model"):
        read_graph(file)
