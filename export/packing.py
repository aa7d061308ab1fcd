"""How codes of a grid become bytes of a container: one row of ``PACKERS`` each.

Packing is exact: a reader of the container gets ``QTensor``'s values back bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.export import packing_onnx
from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Packer:
    """``row_bytes(grid, columns)`` says, by component, what a row takes; ``pack`` makes the rows.

    Both name the same components (``data``, ``scales``, ...); ``pack`` returns uint8
    ``[rows, row_bytes]`` for each.
    """

    row_bytes: Callable[[Grid, int], Mapping[str, int]]
    pack: Callable[[QTensor], Mapping[str, Bytes]]


def _finished(tensor: QTensor) -> Mapping[str, Bytes]:
    assert tensor.packed is not None
    return {"data": tensor.packed}


def _float_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    return {"data": int(grid.bits) // 8 * columns}


GGML_BLOCK_BYTES = {
    "q4_0": 18,
    "q4_1": 20,
    "q5_0": 22,
    "q5_1": 24,
    "q8_0": 34,
    "q2_k": 84,
    "q3_k": 110,
    "q4_k": 144,
    "q5_k": 176,
    "q6_k": 210,
    "iq2_s": 82,
    "iq3_xxs": 98,
    "iq3_s": 110,
    "iq4_nl": 18,
    "iq4_xs": 136,
}
"""Bytes of a block of ``Grid.block`` values (ggml-common.h: the ``block_*`` structs)."""


def _ggml_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    return {"data": columns // grid.block * GGML_BLOCK_BYTES[grid.name]}


PACKERS: dict[str, Packer] = {
    "float": Packer(_float_row_bytes, _finished),
    "ggml": Packer(_ggml_row_bytes, _finished),
    "nbits": Packer(packing_onnx.nbits_row_bytes, packing_onnx.pack_nbits),
    "dynamic": Packer(packing_onnx.dynamic_row_bytes, packing_onnx.pack_dynamic),
    "bnb4": Packer(packing_onnx.bnb4_row_bytes, packing_onnx.pack_bnb4),
}
