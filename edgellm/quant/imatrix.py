"""Rounding that weighs each column's error by its importance, the mean square of its input.

What is minimized of each block is ``sum(importance * (w - value)^2)``, the error of the layer's
output where channels do not depend on one another. On ggml's grids this is llama.cpp's own search
with an importance matrix, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgellm.errors import UsageError
from edgellm.quant import ggml_blocks, rtn
from edgellm.quant.grid import Grid, QTensor
from edgellm.tensors import Array


class Weighing(Protocol):
    """What the solver must know of a layer's inputs (``Statistics`` has it)."""

    @property
    def importance(self) -> Array: ...


@dataclass(frozen=True)
class Importance:
    """Importance float32 ``[in]`` alone, as read from llama.cpp's files."""

    importance: Array


def solve(rows: Array, grid: Grid, statistics: Weighing | None) -> QTensor:
    """``rows`` ``[rows, columns]`` rounded to ``grid``; the same bytes however rows are grouped.

    Ggml's grids come as finished blocks, equal to those of ``llama_model_quantize`` with the same
    importance wherever that is positive. Raises ``UsageError`` without ``statistics``,
    ``TensorError`` for importance that is not finite or of another width.
    """
    if statistics is None:
        raise UsageError("imatrix needs the importance of a layer's inputs: calibrate first")
    importance = lifted(statistics.importance)
    if grid.kind == "ggml":
        from edgellm.quant import ggml  # loads a shared library

        return ggml.quantize(rows, grid, importance)
    return fitted(rows, grid, importance)


def fitted(rows: Array, grid: Grid, importance: Array | None = None) -> QTensor:
    """Codes and scales of ``rows`` on a grid whose codes stand for one value each.

    Where another solver begins: scales are those of the weighted search, in the dtype that they
    are stored in. Without ``importance`` all columns count alike.
    """
    if grid.kind != "ggml":
        return rtn.solve(rows, grid)
    from edgellm.quant import ggml  # loads a shared library

    packed = ggml.quantize(rows, grid, importance).packed
    assert packed is not None
    return ggml_blocks.unpack(packed, grid)


def lifted(importance: Array) -> Array:
    """``importance`` with the smallest positive one in place of zeros; ones where all are zero.

    Ggml turns a block without any importance into zeros. The input of such channels was zero in the
    calibration; that they stay so in use is not sure, and rounding them as well costs nothing.
    """
    positive = importance[importance > 0]
    if not len(positive):
        return np.where(importance == 0, np.float32(1), importance)
    return np.where(importance == 0, positive.min(), importance)
