"""The matrices of a decoder's ONNX graph from elsewhere: which initializers its operators read.

A graph names nothing for certain, so what an initializer is follows from the operator that reads
it: a table is gathered from, the head is as wide as the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.errors import SourceError
from edgellm.profiling.matrices import Kind, Matrix

if TYPE_CHECKING:
    import onnx

TABLES_OF_ANGLES = ("GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding")
"""Operators that read cosines and sines, and no weights."""

ANGLES = re.compile(r"(^|[._/])(cos|sin)(_|$)")

PACKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0, "DequantizeLinear": 0}
"""Operators of quantized matrices, and which input the codes are; the others belong to them."""

BIAS = 5
"""The input of ``MatMulNBits`` that is no part of its matrix; the others have fewer inputs."""

MIXTURE = "QMoE"
"""The operator of a layer's experts in codes."""

OF_EXPERTS = ((2, 3, 11), (5, 6, 12), (8, 9, 13))
"""Its inputs, a stack each of all experts: codes, scales and zeros."""

BITS = 4
"""Of codes where such an operator does not say (ONNX Runtime, contrib operators)."""


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without the data beside it. Raises ``SourceError`` for what is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise SourceError(f"{path} is not an ONNX model, or cut short: {error}") from error


def data_files(model: onnx.ModelProto) -> set[str]:
    """The names of the files beside the graph that hold its data."""
    return {
        entry.value
        for initializer in model.graph.initializer
        for entry in initializer.external_data
        if entry.key == "location"
    }


def of_graph(model: onnx.ModelProto, vocab_size: int) -> list[Matrix]:
    """The matrices that the graph's operators read, each once."""
    initializers = {each.name: each for each in model.graph.initializer}
    found: dict[object, Matrix] = {}
    for node in model.graph.node:
        for place, matrix in _read_by(node, initializers, vocab_size):
            seen = found.get(place)
            # Gathered from and multiplied by: the embedding is the head as well.
            if seen is None or seen.kind == "table":
                found[place] = matrix
    return list(found.values())


def _read_by(
    node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto], vocab_size: int
) -> Iterator[tuple[object, Matrix]]:
    if node.op_type in TABLES_OF_ANGLES:
        return
    inputs = [initializers.get(name) for name in node.input]
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == MIXTURE:
        yield from _stacks(node, inputs, numbers)
        return
    if node.op_type in PACKED:
        codes = inputs[PACKED[node.op_type]]
        if codes is None:
            return
        parts = [each for each in inputs[:BIAS] if each is not None]
        yield _place(codes), _packed(node.op_type, codes, numbers, parts, vocab_size)
        return
    for each in inputs:
        if each is None or len(each.dims) < 2 or min(each.dims) < 2 or ANGLES.search(each.name):
            continue
        if not _holds_weights(each):
            continue
        gathered = node.op_type == "Gather" and each is inputs[0]
        yield (
            _place(each),
            Matrix(
                kind="table" if gathered else _kind(each.dims, vocab_size),
                grid=_type(each),
                weights=math.prod(each.dims),
                nbytes=_nbytes(each),
                rows=each.dims[0],
            ),
        )


def _stacks(
    node: onnx.NodeProto, inputs: list[onnx.TensorProto | None], numbers: dict[str, int]
) -> Iterator[tuple[object, Matrix]]:
    """The stacks of experts, ``[experts, out, packed in]``, of which a token passes ``k``."""
    texts = {attribute.name: attribute.s.decode() for attribute in node.attribute}
    for number, places in enumerate(OF_EXPERTS, 1):
        found = [inputs[place] if place < len(inputs) else None for place in places]
        parts = [each for each in found if each is not None]
        codes = found[0]
        if codes is None:
            continue
        bits = numbers.get(f"fc{number}_expert_weight_bits") or numbers.get("expert_weight_bits")
        bits = bits or BITS
        kind = texts.get("quant_type") or "int"
        grid = f"int{bits}" if kind == "int" else kind
        if kind == "int" and numbers.get("block_size"):
            grid += f"-g{numbers['block_size']}"
        yield (
            _place(codes),
            Matrix(
                kind="layer",
                grid=grid,
                weights=math.prod(codes.dims) * 8 // bits,
                nbytes=sum(map(_nbytes, parts)),
                rows=int(codes.dims[1]),
                share=min(1.0, numbers.get("k", 1) / codes.dims[0]),
            ),
        )


def _packed(
    operator: str,
    codes: onnx.TensorProto,
    numbers: dict[str, int],
    parts: list[onnx.TensorProto],
    vocab_size: int,
) -> Matrix:
    bits, rows = numbers.get("bits", BITS), int(codes.dims[0])
    kind: Kind
    if operator == "MatMulNBits":
        rows, weights = numbers["N"], numbers["N"] * numbers["K"]
        kind = _kind((rows,), vocab_size)
    else:
        in_bytes = _type(codes) == "uint8" and operator == "GatherBlockQuantized"
        weights = math.prod(codes.dims) * (8 // bits if in_bytes else 1)
        kind = "table" if operator == "GatherBlockQuantized" else _kind(codes.dims, vocab_size)
    if operator == "DequantizeLinear":
        grid = _type(codes)
    else:
        grid = f"int{bits}-g{numbers['block_size']}" if numbers.get("block_size") else f"int{bits}"
    return Matrix(kind, grid, weights, sum(map(_nbytes, parts)), rows)


def _kind(dims: Iterable[int], vocab_size: int) -> Kind:
    return "head" if vocab_size in dims else "layer"


def _place(initializer: onnx.TensorProto) -> object:
    """Where the bytes lie: two initializers of one place are one matrix in two shapes."""
    external = {entry.key: entry.value for entry in initializer.external_data}
    if not external:
        return initializer.name
    return external.get("location", ""), external.get("offset", "0")


def _nbytes(initializer: onnx.TensorProto) -> int:
    import onnx

    size = math.prod(initializer.dims)
    if _type(initializer) in ("int4", "uint4"):  # two to a byte
        return (size + 1) // 2
    return int(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).itemsize) * size


def _type(initializer: onnx.TensorProto) -> str:
    import onnx

    return onnx.TensorProto.DataType.Name(initializer.data_type).lower()


def _holds_weights(initializer: onnx.TensorProto) -> bool:
    """Masks and indices are of other types."""
    return _type(initializer).startswith(("float", "bfloat", "int8", "uint8", "int4", "uint4"))
