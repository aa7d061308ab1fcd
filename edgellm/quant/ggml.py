"""Rounding to ggml's blocks and back by ggml's own code (``libgguf``), byte for byte."""

from __future__ import annotations

import libgguf
import numpy as np
import numpy.typing as npt

from edgellm.errors import UnsupportedTarget
from edgellm.quant.floats import check_reach
from edgellm.quant.ggml_types import GgmlType
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.importance import checked
from edgellm.tensors import Array

ROWS_PER_CALL = 32
"""libgguf starts threads of its own from 64 rows on; below, the caller's count of threads holds."""


def quantize(rows: Array, grid: Grid, importance: Array | None = None) -> QTensor:
    """``rows`` ``[rows, columns]`` rounded to ``grid``; ``packed`` holds finished ggml blocks.

    ``importance`` ``[columns]`` weighs the squared error of each column, as llama.cpp's importance
    matrix does; without, ggml's own guess from the weights counts. ``columns`` must be a multiple
    of ``grid.block`` (the layout sees to that), and the values finite: ggml rounds NaN to a finite
    number without a word. Each row is rounded apart, so the bytes do not depend on how rows are
    grouped; the interpreter is free meanwhile. Raises ``TensorError`` for a value that a block's
    f16 scale or minimum may not reach: it would become Inf, also without a word; for importance
    that is not ``columns`` finite numbers of 0 or more; and ``UnsupportedTarget`` where ggml has no
    rounding without importance.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    check_reach(rows, grid.name)
    if importance is not None:
        importance = checked(importance, columns)
    elif libgguf.quantize_requires_imatrix(grid.ggml_type):
        raise UnsupportedTarget(f"{grid.name} is garbage without an importance matrix")
    packed = np.empty((count, libgguf.row_size(grid.ggml_type, columns)), np.uint8)
    for start in range(0, count, ROWS_PER_CALL):
        some, into = rows[start : start + ROWS_PER_CALL], packed[start : start + ROWS_PER_CALL]
        libgguf.quantize_rows_into_raw(grid.ggml_type, some, into, len(some), columns, importance)
    return QTensor(grid, columns, packed=packed)


def dequantize(blocks: npt.NDArray[np.uint8], kind: GgmlType) -> Array:
    """Rows of blocks, uint8 ``[rows, row_bytes]``, as float32 ``[rows, columns]``."""
    columns = blocks.shape[1] // kind.block_bytes * kind.block
    values = np.empty((len(blocks), columns), np.float32)
    for start in range(0, len(blocks), ROWS_PER_CALL):
        some, into = blocks[start : start + ROWS_PER_CALL], values[start : start + ROWS_PER_CALL]
        libgguf.dequantize_rows_into_raw(kind.number, some, into, len(some), columns)
    return values
