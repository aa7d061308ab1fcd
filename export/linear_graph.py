"""Products of the decoder graph, and the floats that stand beside their weights.

The weights of several roles that multiply one value are stacked into one product, on one grid.
Columns that were cut out of them are multiplied apart, in floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgellm.errors import UnsupportedTarget
from edgellm.export.layout import OutputTensor
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.llm_int8 import channels_role, floats_role
from edgellm.tensors import Array, TensorRef

FLOAT = GRIDS["f32"]

OUTLIERS = GRIDS["f16"]
"""What columns that are multiplied apart are stored in, as in the paper."""


@dataclass(frozen=True, slots=True)
class Grids:
    """On which grid the linear layers, the embedding and the head stand.

    ``by_role``: those linear layers whose grid is not the body's.
    """

    body: Grid
    embed: Grid
    head: Grid
    by_role: Mapping[str, Grid] = field(default_factory=dict)

    def of(self, roles: Sequence[str]) -> Grid:
        """The grid of the weights of ``roles``, which are stacked into one product.

        Raises ``UnsupportedTarget`` where they were given different ones.
        """
        names = {role: self.by_role.get(role, self.body) for role in roles}
        grid = names[roles[0]]
        if any(other != grid for other in names.values()):
            apart = ", ".join(f"{role} {other.name}" for role, other in names.items())
            raise UnsupportedTarget(
                f"tensor_grids: ONNX computes {' and '.join(roles)} as one product, which has one "
                f"grid, and they were given {apart}: give all of them the same, or --format gguf"
            )
        return grid


@dataclass
class LinearGraph:
    """Writes products into ``graph``; ``tensors`` are the source's, by role.

    ``inputs``: roles of the weights that each value of the graph is multiplied by, layer by layer.
    """

    graph: GraphBuilder
    tensors: Mapping[str, TensorRef]
    grids: Grids
    inputs: dict[str, list[str]] = field(default_factory=dict)
    _apart: dict[str, tuple[str, str]] = field(default_factory=dict)

    def of_layer(
        self, name: str, roles: list[str], x: str, index: int, grid: Grid | None = None
    ) -> str:
        """One product with the weights of ``roles`` stacked, and the biases that there are.

        ``grid``: where it is not the one that was chosen for them.
        """
        weights = [self.tensors[f"blk.{index}.{role}.weight"] for role in roles]
        whole_roles = [f"blk.{index}.{role}.weight" for role in roles]
        self.inputs.setdefault(x, []).extend(whole_roles)
        grid = grid or self.grids.of(whole_roles)
        packer = operators_of(grid).packer
        tensor = self.graph.store(f"{name}.weight", weights, grid, packer)
        biases = [self.tensors.get(f"blk.{index}.{role}.bias") for role in roles]
        present = [bias for bias in biases if bias is not None]
        bias = self._stacked_bias(f"{name}.bias", present) if present else None
        return self.product(name, x, tensor, whole_roles, bias)

    def product(
        self, name: str, x: str, tensor: OutputTensor, roles: list[str], bias: str | None
    ) -> str:
        """``x`` by ``tensor``, which holds ``roles``, and in float by the columns cut out of it."""
        graph, operators = self.graph, operators_of(tensor.grid)
        if floats_role(roles[0]) not in self.tensors:
            return operators.matmul(graph, x, tensor, name, bias)
        outliers, rest = self._taken_apart(x, roles[0])
        columns = [self.tensors[floats_role(role)] for role in roles]
        floats = operators_of(OUTLIERS)
        weight = graph.store(floats_role(tensor.name), columns, OUTLIERS, floats.packer)
        exact = floats.matmul(graph, outliers, weight, f"{name}.exact", None)
        rounded = operators.matmul(graph, rest, tensor, f"{name}.rounded", bias)
        return graph.node("Add", [rounded, exact], name)

    def vector(self, role: str) -> str:
        """The floats of ``role`` as a value of the graph."""
        return self.stored_float(self.tensors[role])

    def stored_float(self, ref: TensorRef) -> str:
        """``ref`` stored as f32, as a value in what the graph computes in."""
        tensor = self.graph.store(ref.role, [ref], FLOAT, "float")
        stored = self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, ref.shape)
        return self.graph.computed(stored)

    def _taken_apart(self, x: str, role: str) -> tuple[str, str]:
        """The channels of ``x`` that weight ``role`` multiplies as floats, and ``x`` without them.

        Done once for all products of ``x``. Channels are stored as floats, which all files of ours
        consist of beside codes; onnxruntime makes integers and the mask of them when it opens the
        model.
        """
        if x in self._apart:
            return self._apart[x]
        graph, ref = self.graph, self.tensors[channels_role(role)]
        name = f"{x}.outliers"
        channels = graph.node("Cast", [self.stored_float(ref)], f"{name}.at", to=TensorProto.INT64)
        columns = self.tensors[role].columns
        ones = graph.constant(f"ones_{columns}", np.ones(columns, np.float32))
        zeros = graph.constant(f"zeros_{ref.columns}", np.zeros(ref.columns, np.float32))
        mask = graph.node("ScatterElements", [ones, channels, zeros], f"{name}.mask")
        self._apart[x] = (
            graph.node("Gather", [x, channels], name, axis=-1),
            graph.node("Mul", [x, mask], f"{x}.rest"),
        )
        return self._apart[x]

    def _stacked_bias(self, role: str, biases: list[TensorRef]) -> str:
        columns = [_as_column(bias) for bias in biases]
        tensor = self.graph.store(role, columns, FLOAT, "float")
        stored = self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, [tensor.rows])
        return self.graph.computed(stored)


def _as_column(bias: TensorRef) -> TensorRef:
    """A vector ``[n]`` as ``[n, 1]``, so that several stack into one."""

    def load_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(bias.load_rows(0, 1).reshape(-1, 1)[start:stop])

    return TensorRef(bias.name, bias.role, (bias.size, 1), bias.dtype, bias.nbytes, load_rows)
