"""How a weight on some grid is multiplied and looked up by onnxruntime's operators: one row a grid.

``matmul`` computes ``x @ weight.T + bias`` for ``x`` ``[..., in]`` and a weight ``[out, in]``;
``gather`` looks rows of it up. Both may refer to the same stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto

from edgellm.export.layout import OutputTensor, StoredArray
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.quant.grid import Grid

MatMul = Callable[[GraphBuilder, str, OutputTensor, str, str | None], str]
Gather = Callable[[GraphBuilder, str, OutputTensor, str], str]

INT8_ACTIVATIONS = 4
"""MatMulNBits' ``accuracy_level``: products of int8 by codes. Lower ones are many times slower."""

FIRST_ZEROS, ROUTER_WEIGHTS = 11, 14
"""Where zeros and ``router_weights`` stand among QMoE's inputs."""

GATE_UP_IN_TURNS = 1
"""QMoE's ``swiglu_fusion``: rows of gate and up in turns, all that it has on a CPU."""

NF4 = 1
"""MatMulBnb4's ``quant_type``."""


@dataclass(frozen=True, slots=True)
class Operators:
    """One way to hold a weight: the packer that lays it out and the operators that read it.

    ``gather`` is None where no operator looks rows of such a weight up.
    """

    packer: str
    matmul: MatMul
    gather: Gather | None


def operators_of(grid: Grid) -> Operators:
    """The operators for weights on ``grid``; ``KeyError`` where onnxruntime has none."""
    return OPERATORS[grid.kind]


def _part(tensor: OutputTensor, component: str) -> StoredArray | None:
    return next((array for array in tensor.arrays if array.component == component), None)


def _data(tensor: OutputTensor) -> StoredArray:
    return tensor.arrays[0]


def _block_inputs(graph: GraphBuilder, tensor: OutputTensor) -> list[str]:
    """Scales and, where the grid has them, zeros."""
    names: list[str] = []
    scales, zeros = _part(tensor, "scales"), _part(tensor, "zeros")
    if scales is not None:
        blocks = scales.row_bytes // 4
        stored = graph.stored(scales, TensorProto.FLOAT, [tensor.rows, blocks])
        names.append(graph.computed(stored))
    if zeros is not None:
        names.append(graph.stored(zeros, TensorProto.UINT8, [tensor.rows, zeros.row_bytes]))
    return names


def _nbits_matmul(
    graph: GraphBuilder, x: str, tensor: OutputTensor, name: str, bias: str | None
) -> str:
    grid = tensor.grid
    blocks, blob = tensor.columns // grid.block, grid.block * int(grid.bits) // 8
    shape = [tensor.rows, blocks, blob]
    data = graph.stored(_data(tensor), TensorProto.UINT8, shape, f"{tensor.name}.blocks")
    inputs = [x, data, *_block_inputs(graph, tensor)]
    if bias is not None:
        inputs += [""] * (5 - len(inputs)) + [bias]
    return graph.node(
        "MatMulNBits", inputs, name, contrib=True, K=tensor.columns, N=tensor.rows,
        bits=int(grid.bits), block_size=grid.block, accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip


def experts_product(
    graph: GraphBuilder,
    x: str,
    ranked: str,
    scores: str,
    tensors: tuple[OutputTensor, OutputTensor],
    name: str,
    *,
    used: int,
    normalized: bool,
) -> str:
    """The weighed answers ``[tokens, hidden]`` of the experts that ``x``, shaped so too, goes to.

    One operator for all of a layer, with SiLU between gate and up and down. ``tensors``: gate and
    up in turns, and down, each of all experts; grids of ``nbits`` with equal bits and blocks. The
    choice is by ``ranked`` ``[tokens, experts]``, the weights by ``scores``.
    """
    inputs, zeros = [x, ranked], []
    for tensor in tensors:
        rows = tensor.rows // tensor.experts
        data = _data(tensor)
        shape = [tensor.experts, rows, data.row_bytes]
        inputs.append(graph.stored(data, TensorProto.UINT8, shape, f"{tensor.name}.experts"))
        scales, zero = _part(tensor, "scales"), _part(tensor, "zeros")
        assert scales is not None
        shape = [tensor.experts, rows, scales.row_bytes // 4]
        inputs += [graph.stored(scales, TensorProto.FLOAT, shape), ""]
        if zero is not None:
            shape = [tensor.experts, rows, zero.row_bytes]
            zeros.append(graph.stored(zero, TensorProto.UINT8, shape))
    inputs += [""] * (FIRST_ZEROS - len(inputs)) + zeros
    inputs += [""] * (ROUTER_WEIGHTS - len(inputs)) + [scores]
    grid = tensors[0].grid
    return graph.node(
        "QMoE", inputs, name, contrib=True, k=used, normalize_routing_weights=int(normalized),
        activation_type="swiglu", swiglu_fusion=GATE_UP_IN_TURNS, activation_alpha=1.0,
        activation_beta=0.0, expert_weight_bits=int(grid.bits), block_size=grid.block,
        accuracy_level=INT8_ACTIVATIONS,
    )  # fmt: skip


def _nbits_gather(graph: GraphBuilder, ids: str, tensor: OutputTensor, name: str) -> str:
    data = _data(tensor)
    rows = graph.stored(data, TensorProto.UINT8, [tensor.rows, data.row_bytes])
    return graph.node(
        "GatherBlockQuantized", [rows, ids, *_block_inputs(graph, tensor)], name, contrib=True,
        bits=int(tensor.grid.bits), block_size=tensor.grid.block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _float_data(graph: GraphBuilder, tensor: OutputTensor) -> tuple[str, int]:
    """The weight as it is stored, and its type."""
    element = {32: TensorProto.FLOAT, 16: TensorProto.FLOAT16}[int(tensor.grid.bits)]
    return graph.stored(_data(tensor), element, [tensor.rows, tensor.columns]), element


def _float_matmul(
    graph: GraphBuilder, x: str, tensor: OutputTensor, name: str, bias: str | None
) -> str:
    data = graph.computed(*_float_data(graph, tensor))
    product = name if bias is None else f"{name}.product"
    graph.node("FusedMatMul", [x, data], product, contrib=True, transB=1)
    return product if bias is None else graph.node("Add", [product, bias], name)


def _float_gather(graph: GraphBuilder, ids: str, tensor: OutputTensor, name: str) -> str:
    data, element = _float_data(graph, tensor)
    if element == graph.element:
        return graph.node("Gather", [data, ids], name)
    rows = graph.node("Gather", [data, ids], f"{name}.rows")
    return graph.node("Cast", [rows], name, to=graph.element)


def _dynamic_matmul(
    graph: GraphBuilder, x: str, tensor: OutputTensor, name: str, bias: str | None
) -> str:
    scales = _part(tensor, "scales")
    assert scales is not None
    data = graph.stored(_data(tensor), TensorProto.INT8, [tensor.rows, tensor.columns])
    # Folded when the model is opened: rows on disk stay the source's rows, so they stream.
    turned = graph.node("Transpose", [data], f"{name}.turned", perm=[1, 0])
    scale = graph.stored(scales, TensorProto.FLOAT, [tensor.rows])
    inputs = [x, turned, scale, *(() if bias is None else ("", bias))]
    return graph.node("DynamicQuantizeMatMul", inputs, name, contrib=True)


def _bnb4_matmul(
    graph: GraphBuilder, x: str, tensor: OutputTensor, name: str, bias: str | None
) -> str:
    absmax = _part(tensor, "absmax")
    assert absmax is not None
    data = graph.stored(_data(tensor), TensorProto.UINT8, [_data(tensor).nbytes])
    maxima = graph.computed(graph.stored(absmax, TensorProto.FLOAT, [absmax.nbytes // 4]))
    product = name if bias is None else f"{name}.product"
    graph.node(
        "MatMulBnb4", [x, data, maxima], product, contrib=True, K=tensor.columns, N=tensor.rows,
        block_size=tensor.grid.block, quant_type=NF4,
    )  # fmt: skip
    return product if bias is None else graph.node("Add", [product, bias], name)


OPERATORS: dict[str, Operators] = {
    "float": Operators("float", _float_matmul, _float_gather),
    "affine": Operators("nbits", _nbits_matmul, _nbits_gather),
    "per_channel": Operators("dynamic", _dynamic_matmul, None),
    "codebook": Operators("bnb4", _bnb4_matmul, None),
}
