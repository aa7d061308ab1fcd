"""The scales, and minima, that round blocks with the least weighted error; codes follow from them.

For given codes the best scale is known: with weights ``i`` and levels ``q`` it is
``<i w q> / <i q q>``, which leaves ``<i w w> - <i w q>^2 / <i q q>``. So a few scales that span
more or less of a block's range are tried, and the best of those that their codes lead to is kept.
Ggml's search with importance (``make_qx_quants``, ``make_qkx3_quants``) is alike, yet weighs by
``i * sqrt(mean(w^2) + w^2)`` and tries one end of a block's range. Weighted error of SmolLM2's rows
relative to it: q4_0 0.90, q5_0 0.88, iq4_nl 0.91, q4_1 and q5_1 0.95.

Blocks stand in columns, ``[block, blocks]``, so that every step runs along many at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgellm.quant import floats
from edgellm.tensors import Array

STRETCHES = (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12, 1.17, 1.22, 1.28, 1.34, 1.4)
"""Parts of the outermost level that a block's largest value is put on; beyond 1 it is clipped."""

REFITS = 2
"""Times that codes are rounded again with the scale they led to."""

RANGE_STRETCHES = (0.92, 0.97, 1.02, 1.07, 1.12, 1.18, 1.24, 1.3)
RANGE_SHIFTS = (-0.3, 0.0, 0.3)
"""The same for blocks with a minimum, and how far their codes are moved, in parts of a code."""

ZERO_MOVES = (-1, 0, 1)
ZERO_STRETCHES = (0.93, 1.0)
"""The same for whole zeros: codes beside the best one, and parts of the best scale."""

SMALLEST = np.float32(1e-30)
"""Blocks whose values are all smaller count as zero: inverses would leave float32's range."""


class Levels:
    """The levels of a symmetric grid, lowest first, and rounding to the nearest of them."""

    def __init__(self, values: Array) -> None:
        self.lowest, self.highest = np.float32(values[0]), np.float32(values[-1])
        self._table: Array | None = None
        if np.all(np.diff(values) == 1):
            return
        # The nearest level in each of many small steps; at the halves between iq4's whole numbers
        # none of them straddles a border.
        self._steps = np.float32(2 if self.highest > 1 else 2048)
        count = int((self.highest - self.lowest) * self._steps) + 1
        middles = self.lowest + (np.arange(count) + 0.5) / self._steps
        self._borders = (values[:-1] + values[1:]) / np.float32(2)
        self._table = values[np.searchsorted(self._borders, middles)]

    def nearest(self, values: Array) -> Array:
        """The level nearest to each of ``values``, in place."""
        if self._table is None:
            np.rint(values, out=values)
            np.maximum(values, self.lowest, out=values)
            return np.minimum(values, self.highest, out=values)
        np.maximum(values, self.lowest, out=values)
        np.minimum(values, self.highest, out=values)
        values -= self.lowest
        values *= self._steps
        return np.take(self._table, values.astype(np.intp), out=values, mode="clip")

    def codes(self, values: Array) -> npt.NDArray[np.uint8]:
        """The place of the level nearest to each of ``values``; exact, where ``nearest`` of a
        codebook that is not made of whole numbers may take the other of two that are equally near.
        """
        if self._table is None:
            return (self.nearest(values) - self.lowest).astype(np.uint8)
        return np.searchsorted(self._borders, values).astype(np.uint8)


def best_scales(blocks: Array, weights: Array, levels: Levels, *, signed: bool = True) -> Array:
    """The scales ``[blocks]`` for ``blocks`` and ``weights`` ``[block, blocks]``.

    They may be negative where ``signed``, and are zero for blocks of zeros. ``weights`` are 0 or
    more; their size does not matter.
    """
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=0)[None], axis=0)[0]
    if not signed:
        peaks = np.abs(peaks)
    usable = np.abs(peaks) > SMALLEST
    peaks = np.where(usable, peaks, np.float32(1))
    units: Array = blocks * np.reciprocal(peaks)
    best, best_score = np.zeros_like(peaks), np.full_like(peaks, -1)
    work = np.empty_like(units)
    for end in (levels.lowest, levels.highest):
        if end == 0 or (end < 0 and not signed):
            continue
        for stretch in STRETCHES:
            np.multiply(units, np.float32(end * stretch), out=work)
            fit, score = _fit(units, weights, levels.nearest(work))
            better = score > best_score
            np.copyto(best, fit, where=better)
            np.copyto(best_score, score, where=better)
    for _ in range(REFITS):
        np.multiply(units, inverse(best), out=work)
        fit, score = _fit(units, weights, levels.nearest(work))
        np.copyto(best, fit, where=score > best_score)
        np.maximum(score, best_score, out=best_score)
    return np.where(usable, best * peaks, np.float32(0))


def _fit(blocks: Array, weights: Array, levels: Array) -> tuple[Array, Array]:
    """The best scale for ``levels``, and how much of the blocks' weighted power it explains."""
    weighed = weights * levels
    against = np.einsum("ij,ij->j", weighed, blocks)
    power = np.einsum("ij,ij->j", weighed, levels)
    fit = against / np.where(power > 0, power, np.float32(1))
    return fit, fit * against


def best_ranges(
    blocks: Array, weights: Array, top: int, *, positive_mins: bool
) -> tuple[Array, Array]:
    """Scales and minima ``[blocks]`` for codes from 0 to ``top``.

    Without ``positive_mins`` no minimum is above zero, as super-blocks store them.
    """
    low, high = blocks.min(axis=0), blocks.max(axis=0)
    if not positive_mins:
        np.minimum(low, 0, out=low)
    span = high - low
    usable = span > SMALLEST
    span = np.where(usable, span, np.float32(1))
    units = (blocks - low) * (1 / span)
    # The largest minimum that is allowed, in units of the span above the lowest value.
    ceiling = None if positive_mins else -low / span
    sums = _Sums(units, weights)
    scale, least = np.full_like(low, 1 / np.float32(top)), np.zeros_like(low)
    error = np.full_like(low, np.inf)
    work = np.empty_like(units)
    for stretch in RANGE_STRETCHES:
        for shift in RANGE_SHIFTS:
            np.multiply(units, np.float32(top * stretch), out=work)
            middle = np.float32(top * (1 - stretch) / 2 + shift)
            work += middle
            whole_codes(work, top)
            sums.better(work, ceiling, scale, least, error)
    for _ in range(REFITS):
        np.subtract(units, least, out=work)
        work *= inverse(scale)
        whole_codes(work, top)
        sums.better(work, ceiling, scale, least, error)
    return np.where(usable, scale * span, np.float32(0)), low + least * span * usable


def minima_fitted(
    blocks: Array, weights: Array, top: int, dtype: str
) -> tuple[npt.NDArray[np.uint8], Array, Array]:
    """Codes ``[block, blocks]``, scales and minima ``[blocks]``, both as ``dtype`` holds them."""
    scales, mins = best_ranges(blocks, weights, top, positive_mins=True)
    scales, mins = floats.rounded(scales, dtype), floats.rounded(mins, dtype)
    codes = whole_codes((blocks - mins) * inverse(scales), top).astype(np.uint8)
    return codes, scales, mins


def whole_codes(values: Array, top: int) -> Array:
    """The code from 0 to ``top`` nearest to each of ``values``, in place."""
    np.rint(values, out=values)
    np.maximum(values, 0, out=values)
    return np.minimum(values, np.float32(top), out=values)


def best_zeros(blocks: Array, weights: Array, top: int) -> tuple[Array, Array]:
    """Scales and whole zeros ``[blocks]`` for ``(code - zero) * scale``, codes from 0 to ``top``.

    The zeros next to the best minimum are tried, and the one that spans the block: with that alone
    ``rtn`` begins. Scales are positive.
    """
    scales, mins = best_ranges(blocks, weights, top, positive_mins=False)
    high = np.maximum(blocks.max(axis=0), 0)
    low = np.minimum(blocks.min(axis=0), 0)
    widest = high / np.float32(top) - low / np.float32(top)
    starts = [(scales, -mins * inverse(scales) + move) for move in ZERO_MOVES]
    starts.append((widest, -low * inverse(widest)))
    best, best_zero = np.ones_like(scales), np.zeros_like(scales)
    best_score = np.full_like(scales, -1)
    work = np.empty_like(blocks)
    for start, wanted in starts:
        zeros = np.clip(np.rint(wanted), 0, top).astype(np.float32)
        for stretch in ZERO_STRETCHES:
            fit = start * np.float32(stretch)
            for _ in range(1 + REFITS):
                np.multiply(blocks, inverse(fit), out=work)
                work += zeros
                whole_codes(work, top)
                work -= zeros
                fit, score = _fit(blocks, weights, work)
                better = (score > best_score) & (fit > SMALLEST)
                for old, new in ((best, fit), (best_zero, zeros), (best_score, score)):
                    np.copyto(old, new, where=better)
    return best, best_zero


class _Sums:
    """What of ``blocks`` and ``weights`` is summed once for all codes that are tried."""

    def __init__(self, blocks: Array, weights: Array) -> None:
        self.blocks = blocks
        self.weights = weights
        self.ones = weights.sum(axis=0)
        self.ones[self.ones <= 0] = 1
        weighed = weights * blocks
        self.values = weighed.sum(axis=0)
        self.powers = np.einsum("ij,ij->j", weighed, blocks)

    def better(
        self, codes: Array, ceiling: Array | None, scale: Array, least: Array, error: Array
    ) -> None:
        """Put the best fit for ``codes`` where it lowers ``error``, all three in place."""
        new_scale, new_least, new_error = self.fit(codes, ceiling)
        where = new_error < error
        for old, new in ((scale, new_scale), (least, new_least), (error, new_error)):
            np.copyto(old, new, where=where)

    def fit(self, codes: Array, ceiling: Array | None) -> tuple[Array, Array, Array]:
        """Scale, minimum and weighted error: least squares, the minimum at most ``ceiling``."""
        weighed = self.weights * codes
        sums = weighed.sum(axis=0)
        squares = np.einsum("ij,ij->j", weighed, codes)
        against = np.einsum("ij,ij->j", weighed, self.blocks)
        spread = self.ones * squares - sums * sums
        safe = np.where(spread > 0, spread, np.float32(1))
        least = (squares * self.values - sums * against) / safe
        least = np.where(spread > 0, least, np.float32(0))
        if ceiling is not None:
            np.minimum(least, ceiling, out=least)
        scale = (against - least * sums) / np.where(squares > 0, squares, np.float32(1))
        error = self.powers - 2 * (scale * against + least * self.values)
        error += scale * scale * squares + least * (2 * scale * sums + least * self.ones)
        return scale, least, error


def inverse(scales: Array) -> Array:
    """One by each scale, zero for those of zero."""
    divisors = np.where(np.abs(scales) > SMALLEST, scales, np.float32(np.inf))
    inverted: Array = np.reciprocal(divisors)
    return inverted
