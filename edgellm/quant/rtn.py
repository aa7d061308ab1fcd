"""Round to nearest: codes for rows of weights from the rows alone, no calibration data.

Ggml and float grids are rounded by their own modules. For the others the block's scale (and zero)
is the best of a few candidates by squared error, each judged after the scale is refitted: for codes
``q`` the best scale is ``<w, q> / <q, q>``, which leaves the error ``|w|² - <w, q>² / <q, q>``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm.errors import UnsupportedTarget
from edgellm.quant import bnb_4bit, bnb_absmax, floats
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.statistics import Statistics
from edgellm.quant.weighted_search import minima_fitted
from edgellm.tensors import Array

Codes = npt.NDArray[np.uint8]

SHRINK = (1.0, 0.93)
"""Parts of a block's range that candidates for its scale span; a smaller part clips outliers.

KL to the original on held-out text, SmolLM2 off its grid: int4-g32 has 0.337 with one candidate,
0.317 with these two, 0.317 with four (down to 0.79). Symmetric grids take the first alone: clipping
lowers their squared error and yet moves the answers more (0.486; 0.517 with two, 0.527 with four).
"""

REFITS = 1
"""Times that codes are rounded again with the best refitted scale, which is then refitted again."""

SETTINGS = {"shrink": SHRINK, "refits": REFITS}

CHUNK_VALUES = 1 << 18
"""Weights worked on at once: 1 MiB of float32, so that a few copies stay in cache and threads
seldom wait for the interpreter between numpy's steps (a quarter of it took 1.4x as long on two)."""

SMALLEST_SCALE = np.float32(1e-30)
"""Blocks whose scale would be smaller count as zero: its inverse would leave float32's range."""


def solve(rows: Array, grid: Grid, statistics: Statistics | None = None) -> QTensor:
    """``rows`` ``[rows, columns]`` rounded to ``grid``; the same bytes however rows are grouped.

    ``statistics`` are not looked at. ``columns`` must be a multiple of ``grid.block`` and the
    values finite. Scales are rounded to ``grid.scale_dtype`` before the codes are chosen. Of nf4-dq
    all rows of a tensor must come at once: its scales are rounded together. Raises
    ``UnsupportedTarget`` for an unknown grid, ``TensorError`` for scales beyond their dtype.
    """
    if grid.kind == "float":
        return floats.encode(rows, grid)
    if grid.kind == "ggml":
        from edgellm.quant import ggml  # loads a shared library

        return ggml.quantize(rows, grid)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if grid.minima:
        return _with_minima(rows, grid)
    if grid.kind == "affine":
        return _affine(rows, grid)
    if grid.kind == "per_channel":
        return _per_channel(rows, grid)
    if grid.name in ("nf4", "nf4-dq"):
        return _nf4(rows, grid)
    raise UnsupportedTarget(f"rtn cannot round to the grid {grid.name} ({grid.kind})")


def _affine(rows: Array, grid: Grid) -> QTensor:
    count, columns = rows.shape
    blocks = rows.reshape(-1, grid.block)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.float32)
    zeros = np.empty(len(blocks), np.float32)
    step = max(1, CHUNK_VALUES // grid.block)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        scales[part], zeros[part] = _fit(np.ascontiguousarray(blocks[part].T), grid, codes[part])
    return QTensor(
        grid,
        columns,
        codes=codes.reshape(count, columns),
        scales=scales.reshape(count, -1),
        zeros=None if grid.symmetric else zeros.astype(np.uint8).reshape(count, -1),
    )


def _with_minima(rows: Array, grid: Grid) -> QTensor:
    count, columns = rows.shape
    blocks = rows.reshape(-1, grid.block)
    codes = np.empty(blocks.shape, np.uint8)
    scales, mins = np.empty((2, len(blocks)), np.float32)
    step = max(1, CHUNK_VALUES // grid.block)
    weights = np.ones((grid.block, step), np.float32)
    top = 2 ** int(grid.bits) - 1
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        some = np.ascontiguousarray(blocks[part].T)
        alike = np.ascontiguousarray(weights[:, : some.shape[1]])
        found, scales[part], mins[part] = minima_fitted(some, alike, top, grid.scale_dtype)
        codes[part] = found.T
    return QTensor(
        grid,
        columns,
        codes=codes.reshape(count, columns),
        scales=scales.reshape(count, -1),
        mins=mins.reshape(count, -1),
    )


def _fit(blocks: Array, grid: Grid, codes: Codes) -> tuple[Array, Array]:
    """Scales and zeros ``[blocks]`` for ``blocks`` ``[block, blocks]``; fills ``codes``.

    Blocks stand in columns, so that every step runs along many blocks at once.
    """
    top = np.float32(2 ** int(grid.bits) - 1)
    work = np.empty_like(blocks)
    widest, zero = _widest(blocks, grid, top)
    best, best_score = widest, np.full_like(widest, -1.0)
    if grid.bits < 8:  # with 255 steps to a block there is nothing to win
        for part in SHRINK[:1] if grid.symmetric else SHRINK:
            fit, score = _refit(blocks, widest * np.float32(part), zero, top, work)
            better = score > best_score
            best_score = np.where(better, score, best_score)
            best = np.where(better, fit, best)
        for _ in range(REFITS):
            best, _ = _refit(blocks, best, zero, top, work)
    best = _stored(best, grid)
    _round(blocks, best, zero, top, work)
    np.add(work, zero, out=work)
    np.copyto(codes, work.T, casting="unsafe")
    return best, zero


def _widest(blocks: Array, grid: Grid, top: np.float32) -> tuple[Array, Array]:
    """The scale that just spans each block, and its zero."""
    low, high = blocks.min(axis=0), blocks.max(axis=0)
    if grid.symmetric:
        # There is one more code below the zero than above: the larger side takes it, by sign.
        middle = np.float32((int(top) + 1) // 2)
        scale = np.where(-low >= high, low, high) / -middle
        return _usable(scale), np.full_like(scale, middle)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _usable(high / top - low / top)
    return scale, np.clip(np.rint(-low / scale), 0, top)


def _usable(scale: Array) -> Array:
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.float32(1.0), scale)


def _stored(scale: Array, grid: Grid) -> Array:
    """``scale`` as the container stores it; blocks that vanish in its dtype count as zero."""
    return _usable(floats.rounded(scale, grid.scale_dtype))


def _round(blocks: Array, scale: Array, zero: Array, top: np.float32, out: Array) -> None:
    """Codes less their zero, as float32, into ``out``."""
    np.multiply(blocks, 1 / scale, out=out)
    np.maximum(out, -zero, out=out)
    np.minimum(out, top - zero, out=out)
    np.rint(out, out=out)


def _refit(
    blocks: Array, scale: Array, zero: Array, top: np.float32, work: Array
) -> tuple[Array, Array]:
    """The best scale for the codes that ``scale`` gives, and a score that grows as error falls."""
    _round(blocks, scale, zero, top, work)
    against = np.einsum("ij,ij->j", blocks, work)
    power = np.einsum("ij,ij->j", work, work)
    some = power > 0
    safe = np.where(some, power, np.float32(1.0))
    fit = np.where(some, against / safe, scale)
    return _usable(fit), np.where(some, np.abs(against) / np.sqrt(safe), np.float32(0.0))


def _per_channel(rows: Array, grid: Grid) -> QTensor:
    """One scale a row, from its largest magnitude: int8 codes around 128, -127 to 127."""
    scale = _stored(np.abs(rows).max(axis=1, keepdims=True) / np.float32(127.0), grid)
    work = np.rint(rows * (1 / scale))
    codes = (np.clip(work, -127, 127, out=work) + np.float32(128.0)).astype(np.uint8)
    return QTensor(grid, rows.shape[1], codes=codes, scales=scale)


def _nf4(rows: Array, grid: Grid) -> QTensor:
    """The nearest of the sixteen levels times the block's largest magnitude, as bitsandbytes.

    For nf4-dq the magnitudes are rounded to 8 bits after that: codes go by the exact ones.
    """
    count, columns = rows.shape
    values = rows.reshape(-1)
    absmax = bnb_4bit.block_absmax(values, grid.block)
    codes = bnb_4bit.quantize(values, absmax, "nf4", grid.block)
    doubled = bnb_absmax.quantize(absmax) if grid.name == "nf4-dq" else None
    scales = absmax if doubled is None else bnb_absmax.values_of(doubled)
    return QTensor(
        grid,
        columns,
        codes=codes.reshape(count, columns),
        scales=scales.reshape(count, -1),
        doubled=doubled,
    )
