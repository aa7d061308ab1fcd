"""Matrices of ONNX graphs as other tools lay them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgellm.errors import SourceError
from edgellm.profiling.matrices import Matrix, counted
from edgellm.profiling.onnx_matrices import data_files, of_graph, read_graph


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


def test_of_experts_in_codes_a_token_reads_those_that_it_needs() -> None:
    found = of_graph(
        graph(
            [
                node("QMoE", ["x", "router", "up", "up_s", "up_b", "down", "down_s"], ["y"],
                     k=2, expert_weight_bits=4, block_size=32),
            ],
            up=((8, 96, 32), BYTE), up_s=((8, 96, 2), HALF), up_b=((8, 96), HALF),
            down=((8, 64, 24), BYTE), down_s=((8, 64), FLOAT),
        ),
        vocab_size=100,
    )  # fmt: skip
    assert set(found) == {
        Matrix("layer", "int4-g32", 8 * 96 * 64, 8 * (96 * 32 + 96 * 2 * 2), 96, 0.25),
        Matrix("layer", "int4-g32", 8 * 64 * 48, 8 * (64 * 24 + 64 * 4), 64, 0.25),
    }


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(SourceError, match="not an ONNX model"):
        read_graph(file)
