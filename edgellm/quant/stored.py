"""Codes that a source holds already: taken over onto a grid that can hold them exactly.

The solver of weights that need none. A value is ``(code - zero) * scale`` of its group, or
``level(code) * scale`` of a codebook; readers of the source may round the product to the dtype of
the scales, readers of a container do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgellm.quant import floats
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.qtensor_rows import stacked
from edgellm.tensors import Array, LoadRows, TensorRef, check_finite, rows_in_order, spans_of

Codes = npt.NDArray[np.uint8]
Zeros = npt.NDArray[np.int16]
Order = npt.NDArray[np.intp]

WITH_A_SCALE = ("q4_0", "q5_0", "q8_0")
"""ggml's blocks of integers around zero and a scale."""


class Spread(NamedTuple):
    """What the zeros and scales of a whole tensor have in common."""

    least_zero: int
    largest_zero: int
    whole_zeros: bool
    exact_scales: frozenset[str]
    exact_minima: frozenset[str]


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """The codes of one quantized matrix, and a ``LoadRows`` of the values that they stand for.

    It is the ``load_rows`` of its ``TensorRef``, so that whatever changes the values has no codes.
    ``codes(start, stop)`` are uint8 ``[stop - start, columns]``, ``scales(start, stop)`` float32
    and ``zeros(start, stop)`` int16 ``[stop - start, groups]``; without ``zeros`` the zero is
    ``2 ** (bits - 1)``, or there is none with a ``codebook`` (``nf4``). ``minima(start, stop)`` are
    float32 ``[stop - start, groups]``, in the place of zeros. ``groups()`` gives the group of each
    column.
    """

    values: LoadRows
    rows: int
    bits: int
    codes: Callable[[int, int], Codes]
    scales: Callable[[int, int], Array]
    groups: Callable[[], Order]
    zeros: Callable[[int, int], Zeros] | None = None
    minima: Callable[[int, int], Array] | None = None
    codebook: str = ""

    def __call__(self, start: int, stop: int) -> Array:
        return self.values(start, stop)

    def in_order(self, order: Order) -> StoredCodes:
        """The same with its rows taken in ``order``; ``values`` too."""
        return replace(
            self,
            values=rows_in_order(self.values, order),
            codes=rows_in_order(self.codes, order),
            scales=rows_in_order(self.scales, order),
            zeros=None if self.zeros is None else rows_in_order(self.zeros, order),
            minima=None if self.minima is None else rows_in_order(self.minima, order),
        )

    @cached_property
    def order(self) -> Order:
        """The group of each column. Raises ``SourceError`` where it cannot be known."""
        return self.groups()

    @cached_property
    def spread(self) -> Spread:
        """Reads scales and zeros, which are a small part of a tensor, whole."""
        scales = self.scales(0, self.rows)
        middle = np.int16(2 ** (self.bits - 1))
        zeros = np.full(1, middle) if self.zeros is None else self.zeros(0, self.rows)
        with np.errstate(over="ignore", invalid="ignore"):
            minima = -scales * zeros
            whole = self.minima is None
            if self.minima is not None:
                stated = self.minima(0, self.rows)
                whole, minima = np.array_equal(stated, minima), stated
            return Spread(
                int(zeros.min()), int(zeros.max()), whole, _exact_in(scales), _exact_in(minima)
            )


def codes_of(ref: TensorRef) -> StoredCodes | None:
    """The codes that ``ref`` is stored as, None where it is not or its values were changed."""
    return ref.load_rows if isinstance(ref.load_rows, StoredCodes) else None


def why_not(stored: StoredCodes, grid: Grid) -> str:
    """Why ``grid`` cannot hold the codes exactly; empty where it can.

    Reads the order of the groups, and scales and zeros where they decide.
    """
    if stored.codebook:
        if grid.kind == "codebook" and grid.name == stored.codebook:
            return _why_not_groups(stored, grid)
        return f"{grid.name} does not have the levels of {stored.codebook}"
    if not _has_steps(grid):
        return f"{grid.name} is not made of integers with one scale"
    return (
        _why_not_groups(stored, grid)
        or _why_not_range(stored, grid)
        or _why_not_scales(stored, grid)
    )


def take_over(stored: StoredCodes, grid: Grid, start: int, stop: int) -> QTensor:
    """Rows ``start:stop`` of ``stored`` on ``grid``, which must be able to hold them (``why_not``).

    A longer group repeats its scale. Raises ``TensorError`` for a scale that is NaN or Inf.
    """
    codes, scales = stored.codes(start, stop), stored.scales(start, stop)
    check_finite(scales, "scales", first_row=start)
    columns = codes.shape[1]
    first = stored.order[:: grid.block or columns]
    by_block = np.ascontiguousarray(scales[:, first])
    if stored.codebook:
        return QTensor(grid, columns, codes=codes, scales=by_block)
    middle = np.int16(2 ** (stored.bits - 1))
    zeros = np.full_like(scales, middle, np.int16)
    if stored.zeros is not None:
        zeros = stored.zeros(start, stop)
    if grid.minima:
        minima = -(scales * zeros) if stored.minima is None else stored.minima(start, stop)
        mins = np.ascontiguousarray(minima[:, first])
        return QTensor(grid, columns, codes=codes, scales=by_block, mins=mins)
    if not grid.symmetric:
        by_block_zeros = np.ascontiguousarray(zeros[:, first], np.uint8)
        return QTensor(grid, columns, codes=codes, scales=by_block, zeros=by_block_zeros)
    shift = np.int16(2 ** (int(grid.bits) - 1)) - zeros
    if (shift == shift.flat[0]).all():
        steps = codes.astype(np.int16) + shift.flat[0]
    else:
        steps = codes + shift[:, stored.order]
    return QTensor(grid, columns, codes=steps.astype(np.uint8), scales=by_block)


def take_over_stacked(parts: Sequence[TensorRef], grid: Grid, start: int, stop: int) -> QTensor:
    """``take_over`` of rows ``start:stop`` of ``parts`` laid one below the other."""
    pieces = []
    for part, low, high in spans_of(parts, start, stop):
        codes = codes_of(part)
        assert codes is not None, part.name
        pieces.append(take_over(codes, grid, low, high))
    return stacked(pieces)


def _has_steps(grid: Grid) -> bool:
    if grid.kind == "ggml":
        return grid.minima or grid.name in WITH_A_SCALE
    return grid.kind in ("affine", "per_channel")


def _why_not_groups(stored: StoredCodes, grid: Grid) -> str:
    columns = len(stored.order)
    block = grid.block or columns
    if columns % block:
        return f"groups of {block} do not divide rows of {columns}"
    blocks = stored.order.reshape(-1, block)
    if (blocks == blocks[:, :1]).all():
        return ""
    if np.diff(stored.order).min() < 0:
        return "the groups are permuted (g_idx)"
    return f"their groups are shorter than {grid.name}'s"


def _why_not_range(stored: StoredCodes, grid: Grid) -> str:
    spread, last = stored.spread, 2**stored.bits - 1
    half = 2 ** (int(grid.bits) - 1)
    if not spread.whole_zeros and not grid.minima:
        return f"their minima are no whole steps, and {grid.name} has no room for such"
    if not grid.symmetric:
        fits = last < 2 * half and (grid.minima or spread.largest_zero < 2 * half)
        return "" if fits else f"codes of {stored.bits} bits are too many for {grid.name}"
    if spread.largest_zero <= half and last - spread.least_zero < half:
        return ""
    if spread.least_zero == spread.largest_zero == 2 ** (stored.bits - 1):
        return f"codes of {stored.bits} bits are too many for {grid.name}"
    return f"they have zeros, and {grid.name} has no room for them"


def _why_not_scales(stored: StoredCodes, grid: Grid) -> str:
    dtype = "f16" if grid.kind == "ggml" else grid.scale_dtype
    if dtype not in stored.spread.exact_scales:
        return f"their scales are not {dtype} numbers, as {grid.name}'s are"
    if grid.minima and dtype not in stored.spread.exact_minima:
        return f"their zeros times scales are not {dtype} numbers, as {grid.name}'s minima are"
    return ""


def _exact_in(values: Array) -> frozenset[str]:
    """The dtypes that hold all of ``values`` exactly."""
    return frozenset(dtype for dtype in floats.ENCODERS if _is_exact(values, dtype))


def _is_exact(values: Array, dtype: str) -> bool:
    """Whether all of ``values`` are numbers of ``dtype``; what is not finite is none."""
    largest = {"f16": floats.LARGEST_F16, "bf16": floats.LARGEST_BF16}.get(dtype, np.inf)
    flat = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(flat).all() or np.abs(flat).max(initial=0) > largest:
        return False
    return bool(np.array_equal(floats.rounded(flat, dtype), flat))
