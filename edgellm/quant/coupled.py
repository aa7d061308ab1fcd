"""GPTQ whose rows make good each other's errors: rounding by what the model answers.

What rounding a weight ``[out, in]`` by ``e`` costs the answers is about ``trace(G @ e @ H @ e.T)``,
with ``H`` of its inputs, as in ``gptq``, and ``G`` of the gradients of its outputs. ``gptq`` alone
takes ``G`` for a multiple of one, and rows for independent. Here the rows that cost most come
first, and the error of each is taken off the later ones as far as they can make it good, as that of
a column is within a row (``factor``): YAQA's rounding by both factors (Tseng, Sun and De Sa, arXiv
2505.22988, section 3.2), in one pass, with blocks of rows and the scales of ``gptq``.
"""

from __future__ import annotations

import numpy as np

from edgellm.errors import TensorError
from edgellm.quant import gptq
from edgellm.quant.dequantize import dequantize
from edgellm.quant.factor import factor
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.group_scales import FIXED_SCALES
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.quant.qtensor_rows import rows_of, stacked
from edgellm.quant.row_tiles import TILE_ROWS
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

BLOCK_ROWS = TILE_ROWS
"""Rows that are solved at once, as if independent of each other."""

DAMPING = 0.5
"""Part of the mean of ``G``'s diagonal that is added to it.

SmolLM2 in q4_0, the built-in text, KL in llama.cpp: 0.0838 with rows apart; 0.0731 with 0.2,
0.0735 with 0.5, 0.0728 with 1, all within an error of 0.0009. By gradients as they are
(``tune/gradients.py`` clips them) 0.0819 with 0.05, 0.0762 with 0.5, 0.0767 with 2; 16 rows at once
in the stead of 64 gave 0.0811 for 0.0819, in twice the time. Calibrated on text of the judged kind:
0.0571 apart, 0.0480 with 0.5.
"""

SETTINGS = {"damping": DAMPING, "block_rows": BLOCK_ROWS}


def couples(grid: Grid) -> bool:
    """Whether rows of ``grid`` can be solved one after another, by codes for single values."""
    return grid.kind != "float" and grid.name not in (*VECTOR_CODEBOOKS, *FIXED_SCALES)


def solve(
    rows: Array,
    grid: Grid,
    statistics: Statistics | None,
    torch_device: str | None = None,
    *,
    output_hessian: Array,
) -> QTensor:
    """As ``gptq.solve``, for the least of ``trace(G @ e @ H @ e.T)``.

    ``output_hessian``: ``G`` float32 ``[rows, rows]``, of a grid that ``couples``. Raises what
    ``gptq.solve`` does, and ``TensorError`` where ``G`` is not finite.
    """
    if not np.isfinite(output_hessian).all():
        raise TensorError(
            "the gradients of the outputs are not finite: the model overflows on this text; try "
            "other calibration text, or leave --tune out"
        )
    found = factor(output_hessian, DAMPING)
    rows, feedback = rows[found.order], found.feedback
    errors = np.empty_like(rows)
    parts: list[QTensor] = []
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        target = rows[part]
        if start:
            own = feedback[part, part].copy()
            own.reshape(-1)[:: len(own) + 1] = 1
            target = target - np.linalg.solve(own, feedback[part, :start] @ errors[:start])
        parts.append(gptq.solve(target, grid, statistics, torch_device))
        errors[part] = dequantize(parts[-1]) - rows[part]
    return rows_of(stacked(parts), np.argsort(found.order))
