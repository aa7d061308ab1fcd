"""Rounding that weighs each column's error by its importance, the mean square of its input.

What is minimized is ``sum(importance * (w - value)^2)``, the error of the layer's output where
channels do not depend on one another. The search is our own, and better than the one of
``llama_model_quantize`` with the same importance (SmolLM2 off its grid, all linear layers in q4_0:
KL 0.175 against 0.212); vector codebooks are left to ggml.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.quant import bnb_absmax, floats, ggml_blocks, rtn
from edgellm.quant.grid import Grid, QTensor, SuperBlocks
from edgellm.quant.importance import Importance, Weighing, checked, lifted
from edgellm.quant.levels import VECTOR_CODEBOOKS, levels_of
from edgellm.quant.weighted_search import (
    REFITS,
    STRETCHES,
    Levels,
    best_scales,
    best_zeros,
    inverse,
    minima_fitted,
    whole_codes,
)
from edgellm.quant.weighted_supers import best_supers
from edgellm.tensors import Array

__all__ = ["Importance", "fitted", "lifted", "solve"]

Codes = npt.NDArray[np.uint8]

CHUNK_VALUES = 1 << 17
"""Weights worked on at once, so that the copies of them stay in the cache."""

SETTINGS: dict[str, Any] = {"stretches": STRETCHES, "refits": REFITS}


def solve(rows: Array, grid: Grid, statistics: Weighing | None) -> QTensor:
    """``rows`` ``[rows, columns]`` rounded to ``grid``; the same bytes however rows are grouped.

    Vector codebooks come as finished blocks, equal to those of ``llama_model_quantize`` with the
    same importance wherever that is positive. Raises ``UsageError`` without ``statistics``,
    ``TensorError`` for importance that is not finite or of another width.
    """
    if statistics is None:
        raise UsageError("imatrix needs the importance of a layer's inputs: calibrate first")
    if grid.kind == "float":
        return floats.encode(rows, grid)
    if grid.name in VECTOR_CODEBOOKS:
        from edgellm.quant import ggml  # loads a shared library

        return ggml.quantize(rows, grid, lifted(statistics.importance))
    return fitted(rows, grid, statistics.importance)


def fitted(rows: Array, grid: Grid, importance: Array | None = None) -> QTensor:
    """Codes and scales of ``rows`` on a grid whose codes stand for one value each.

    Scales are the best found for the weighted error, in the dtype that they are stored in; codes
    are the nearest. Without ``importance`` all columns count alike. Eight bits are rounded as
    without importance: nothing is left to win there. Raises ``UnsupportedTarget`` for floats and
    vector codebooks, ``TensorError`` for importance that cannot be one and values out of reach.
    """
    if grid.kind == "float" or grid.name in VECTOR_CODEBOOKS:
        raise UnsupportedTarget(f"{grid.name} has no codes that stand for one value each")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    columns = rows.shape[1]
    if importance is None:
        importance = np.ones(columns, np.float32)
    importance = lifted(checked(importance, columns))
    if grid.kind == "ggml":
        floats.check_reach(rows, grid.name)
    if grid.bits == 8:
        return _eight_bits(rows, grid)
    if grid.name == "nf4-dq":
        return _doubled(fitted(rows, replace(grid, name="nf4"), importance), rows, grid)
    # Sums of squares must stay within float32.
    importance = importance / importance.mean(dtype=np.float64)
    step = max(2, CHUNK_VALUES // columns)
    weights = np.tile(importance.astype(np.float32).reshape(-1, grid.group).T, (1, step))
    parts = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        if len(some) == 1:  # numpy sums a single column in another order
            some = np.repeat(some, 2, axis=0)
        blocks = np.ascontiguousarray(some.reshape(-1, grid.group).T)
        weighed = np.ascontiguousarray(weights[:, : blocks.shape[1]])
        parts.append(_searched(blocks, weighed, grid, len(some)))
    return _joined(parts, grid, len(rows))


def _eight_bits(rows: Array, grid: Grid) -> QTensor:
    if grid.kind != "ggml":
        return rtn.solve(rows, grid)
    blocks = rows.reshape(-1, grid.group)
    # Ggml chooses codes before it rounds the scale to f16.
    scales = floats.rounded(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127), "f16")
    codes = np.rint(blocks * inverse(scales))
    codes = (np.clip(codes, -127, 127, out=codes) + np.float32(128)).astype(np.uint8)
    return QTensor(grid, rows.shape[1], codes.reshape(rows.shape), scales.reshape(len(rows), -1))


def _doubled(tensor: QTensor, rows: Array, grid: Grid) -> QTensor:
    """The scales of ``tensor`` rounded to 8 bits, as bitsandbytes does, and codes for those."""
    assert tensor.scales is not None
    doubled = bnb_absmax.quantize(tensor.scales.reshape(-1))
    scales = bnb_absmax.values_of(doubled).reshape(tensor.scales.shape)
    parts = rows.reshape(*scales.shape, -1) * inverse(scales)[:, :, None]
    codes = Levels(levels_of(grid)).codes(parts).reshape(rows.shape)
    return QTensor(grid, tensor.columns, codes, scales, doubled=doubled)


def _searched(blocks: Array, weights: Array, grid: Grid, rows: int) -> QTensor:
    """The tensor of ``rows`` rows, of which ``blocks`` ``[group, blocks]`` are the groups."""
    columns = blocks.size // rows
    top = 2 ** int(grid.bits) - 1

    def in_rows(codes: Codes) -> Codes:
        return np.ascontiguousarray(codes.T).reshape(rows, columns)

    if grid.sub_block is not None:
        codes, supers = best_supers(blocks, weights, grid, rows)
        return ggml_blocks.with_supers(grid, in_rows(codes), supers)
    dtype = "f16" if grid.kind == "ggml" else grid.scale_dtype
    zeros = mins = None
    if grid.symmetric:
        levels = Levels(levels_of(grid))
        # bitsandbytes' and onnxruntime's kernels take the scale of a codebook for a magnitude.
        scales = best_scales(blocks, weights, levels, signed=grid.kind != "codebook")
        scales = floats.rounded(scales, dtype)
        codes = levels.codes(blocks * inverse(scales))
    elif grid.minima:
        codes, scales, mins = minima_fitted(blocks, weights, top, dtype)
        mins = mins.reshape(rows, -1)
    else:
        scales, shifts = best_zeros(blocks, weights, top)
        scales = floats.rounded(scales, dtype)
        codes = whole_codes(blocks * inverse(scales) + shifts, top).astype(np.uint8)
        zeros = shifts.astype(np.uint8).reshape(rows, -1)
    return QTensor(grid, columns, in_rows(codes), scales.reshape(rows, -1), zeros=zeros, mins=mins)


def _joined(parts: list[QTensor], grid: Grid, count: int) -> QTensor:
    """One tensor of the first ``count`` rows of all ``parts``."""

    def rows(arrays: list[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)[:count]

    supers = None
    if grid.sub_block is not None:
        names = [field.name for field in fields(SuperBlocks)]
        each = [[getattr(part.supers, name) for part in parts] for name in names]
        supers = SuperBlocks(*(rows(arrays) for arrays in each))
    return QTensor(
        grid,
        parts[0].columns,
        codes=rows([part.codes for part in parts]),
        scales=rows([part.scales for part in parts]),
        zeros=rows([part.zeros for part in parts]),
        mins=rows([part.mins for part in parts]),
        supers=supers,
    )
