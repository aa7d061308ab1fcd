"""Rows of codes as GGUF holds them: ggml's blocks, laid out as ``quant.ggml_blocks`` says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgellm.quant import ggml_blocks, ggml_types
from edgellm.quant.grid import Grid, QTensor

Bytes = npt.NDArray[np.uint8]


def row_bytes(grid: Grid, columns: int) -> Mapping[str, int]:
    """Bytes of a row: that many whole blocks."""
    return {"data": columns // grid.block * ggml_types.NAMED[grid.name].block_bytes}


def pack(tensor: QTensor) -> Mapping[str, Bytes]:
    """Blocks of the codes, or the finished blocks that ``tensor`` holds.

    Raises ``TensorError`` where a scale or minimum is not exactly an f16.
    """
    return {"data": ggml_blocks.pack(tensor) if tensor.packed is None else tensor.packed}


def unpack(components: Mapping[str, Bytes], grid: Grid, columns: int) -> QTensor:
    """The inverse of ``pack``: codes and scales; vector codebooks stay finished blocks."""
    data = components["data"]
    if grid.name in ggml_blocks.LAYOUTS:
        return ggml_blocks.unpack(data, grid)
    return QTensor(grid, columns, packed=data)
