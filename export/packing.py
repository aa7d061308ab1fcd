"""How codes of a grid become bytes of a container: one row of ``PACKERS`` each.

Packing is exact: a reader of the container gets ``QTensor``'s values back bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.export import packing_gguf, packing_onnx
from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Packer:
    """``row_bytes(grid, columns)`` says, by component, what a row takes; ``pack`` makes the rows.

    Both name the same components (``data``, ``scales``, ...); ``pack`` returns uint8
    ``[rows, row_bytes]`` for each. ``unpack(components, grid, columns)`` is its inverse: codes and
    scales of rows that were written before.
    """

    row_bytes: Callable[[Grid, int], Mapping[str, int]]
    pack: Callable[[QTensor], Mapping[str, Bytes]]
    unpack: Callable[[Mapping[str, Bytes], Grid, int], QTensor]


def _finished(tensor: QTensor) -> Mapping[str, Bytes]:
    assert tensor.packed is not None
    return {"data": tensor.packed}


def _as_finished(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    return QTensor(grid, columns, packed=components["data"])


def _float_row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    return {"data": int(grid.bits) // 8 * columns}


PACKERS: dict[str, Packer] = {
    "float": Packer(_float_row_bytes, _finished, _as_finished),
    "ggml": Packer(packing_gguf.row_bytes, packing_gguf.pack, packing_gguf.unpack),
    "nbits": Packer(
        packing_onnx.nbits_row_bytes, packing_onnx.pack_nbits, packing_onnx.unpack_nbits
    ),
    "dynamic": Packer(
        packing_onnx.dynamic_row_bytes, packing_onnx.pack_dynamic, packing_onnx.unpack_dynamic
    ),
    "bnb4": Packer(packing_onnx.bnb4_row_bytes, packing_onnx.pack_bnb4, packing_onnx.unpack_bnb4),
}
