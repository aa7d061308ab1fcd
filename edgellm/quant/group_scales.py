"""The scales of a rounded tensor while its codes are solved: read column by column, refitted.

Arrays are tiles (``row_tiles``), ``[tiles, groups, rows]``, numpy's or torch's (``arrays``). A
*level* is what the scale of its group is multiplied by, ``value = level * scale`` and then
``+ min``; with integer zeros it is the code less its zero.
"""

from __future__ import annotations

import numpy as np

from edgellm.quant import arrays
from edgellm.quant.grid import Grid, QTensor, SuperBlocks
from edgellm.quant.levels import CODEBOOKS, levels_of
from edgellm.quant.row_tiles import from_tiles, to_tiles
from edgellm.tensors import Array

SCALE_CODES: dict[str, tuple[int, int]] = {
    "q2_k": (0, 15),
    "q3_k": (-32, 31),
    "q4_k": (0, 63),
    "q5_k": (0, 63),
    "q6_k": (-128, 127),
    "iq4_xs": (-32, 31),
}
"""The smallest and the largest scale code of super-blocks; minimum codes end there too."""

FIXED_SCALES = ("nf4-dq",)
"""Grids whose scales are themselves rounded together, so that none of them can move alone."""


ALL = slice(None)


class GroupScales:
    """Mutable; one for each slab of rows."""

    def __init__(self, start: QTensor, torch_device: str | None = None) -> None:
        """``start`` must hold codes; its scales (zeros, mins, super-blocks) are where to begin.

        They become tensors on ``torch_device``, where one is named.
        """
        assert start.scales is not None

        def tiles(rows: Array) -> Array:
            return arrays.moved(to_tiles(rows), torch_device)

        self.grid: Grid = start.grid
        self._doubled = start.doubled
        self.scales = tiles(start.scales)
        self.group = start.columns // self.scales.shape[1]
        self.mins = None if start.mins is None else tiles(start.mins)
        self.zeros = None if start.zeros is None else tiles(start.zeros.astype(np.float32))
        self.outer: Array | None = None
        self.outer_mins: Array | None = None
        self.groups_per_block = 1
        if start.supers is not None:
            self.outer = tiles(start.supers.scales)
            if start.supers.mins is not None:
                self.outer_mins = tiles(start.supers.mins)
            self.groups_per_block = self.scales.shape[1] // self.outer.shape[1]
        levels = levels_of(self.grid)
        # One code less where the format has no use for the lowest: ggml's and int8 kernels negate.
        spare = self.grid.name in ("q8_0", "int8-dynamic")
        self.lowest, self.highest = levels[1 if spare else 0], levels[-1]
        self._table: Array | None = None
        self._borders: Array | None = None
        if self.grid.name in CODEBOOKS:
            self._table = arrays.moved(levels, torch_device)
            self._borders = arrays.moved((levels[1:] + levels[:-1]) / np.float32(2), torch_device)
        self._inverse = _inverse(self.scales)

    def nearest(self, targets: Array, group: int) -> Array:
        """Levels of the values nearest to ``targets`` ``[tiles, rows]``, with the group's scale."""
        if self.mins is not None:
            targets = targets - self.mins[:, group]
        levels = targets * self._inverse[:, group]
        if self._table is not None and self._borders is not None:
            return arrays.nearest_entries(self._table, self._borders, levels)
        if self.zeros is None:
            arrays.round_within(levels, self.lowest, self.highest)
        else:
            zeros = self.zeros[:, group]
            arrays.round_within(levels, self.lowest - zeros, self.highest - zeros)
        return levels

    def values(self, levels: Array, group: int) -> Array:
        """What ``levels`` ``[tiles, rows]`` or ``[tiles, columns, rows]`` stand for in a group."""
        between = (
            (slice(None), group) if levels.ndim == 2 else (slice(None), slice(group, group + 1))
        )
        values = levels * self.scales[between]
        if self.mins is not None:
            values += self.mins[between]
        return values

    def storable(self, scales: Array, group: int) -> Array:
        """The scales that can be stored for the group nearest to ``scales`` ``[tiles, rows]``."""
        if self.outer is None:
            return arrays.as_stored(scales, self._dtype)
        outer = self.outer[:, group // self.groups_per_block]
        codes = arrays.within(
            arrays.rounded(scales * _inverse(outer)), *SCALE_CODES[self.grid.name]
        )
        products: Array = outer * codes
        return products

    def storable_mins(self, mins: Array, group: int) -> Array:
        """As ``storable``, of minima."""
        if self.outer_mins is None:
            return arrays.as_stored(mins, self._dtype)
        outer = self.outer_mins[:, group // self.groups_per_block]
        codes = arrays.within(
            arrays.rounded(-mins * _inverse(outer)), 0, SCALE_CODES[self.grid.name][1]
        )
        products: Array = -(outer * codes)
        return products

    def storable_outer(self, scales: Array) -> Array:
        """As ``storable``, of the scales of super-blocks or their minima: f16 in all of them."""
        return arrays.as_stored(scales, "f16")

    def scale_codes(self, groups: slice = ALL) -> Array:
        """The small integers of super-blocks that make the scales of ``groups``, as float32."""
        assert self.outer is not None
        return self._codes(self.scales, self.outer, groups)

    def min_codes(self, groups: slice = ALL) -> Array:
        """As ``scale_codes``, of minima."""
        assert self.mins is not None
        assert self.outer_mins is not None
        return -self._codes(self.mins, self.outer_mins, groups)

    def _codes(self, products: Array, outer: Array, groups: slice) -> Array:
        per_group = arrays.repeat(_inverse(outer), self.groups_per_block)
        return arrays.rounded(products[:, groups] * per_group[:, groups])

    def set_scales(self, groups: int | slice, scales: Array) -> None:
        self.scales[:, groups] = scales
        self._inverse[:, groups] = _inverse(scales)

    def finished(self, levels: Array, count: int) -> QTensor:
        """The tensor of ``count`` rows with these scales and ``levels`` ``[tiles, columns, rows]``.

        Codes are those of the levels, so values are exactly ``values(levels)``.
        """
        columns = levels.shape[1]
        if self.zeros is not None:
            levels = levels + arrays.repeat(self.zeros, self.group)
        numbers = arrays.to_numpy(levels)
        if self._table is not None:
            codes = np.searchsorted(levels_of(self.grid), numbers).astype(np.uint8)
        else:
            codes = (numbers - levels_of(self.grid)[0]).astype(np.uint8)
        return QTensor(
            self.grid,
            columns,
            codes=from_tiles(codes, count),
            scales=_rows(self.scales, count),
            zeros=None if self.zeros is None else _rows(self.zeros, count).astype(np.uint8),
            mins=None if self.mins is None else _rows(self.mins, count),
            supers=self._supers(count),
            doubled=self._doubled,
        )

    def _supers(self, count: int) -> SuperBlocks | None:
        if self.outer is None:
            return None
        mins = min_codes = None
        if self.outer_mins is not None:
            mins = _rows(self.outer_mins, count)
            min_codes = _rows(self.min_codes(), count).astype(np.uint8)
        scale_codes = _rows(self.scale_codes(), count).astype(np.int16)
        return SuperBlocks(_rows(self.outer, count), scale_codes, mins, min_codes)

    @property
    def _dtype(self) -> str:
        return "f16" if self.grid.kind == "ggml" else self.grid.scale_dtype


def _rows(tiles: Array, count: int) -> Array:
    return from_tiles(arrays.to_numpy(tiles), count)


def _inverse(scales: Array) -> Array:
    """``1 / scales``, 0 where that is none."""
    return arrays.quotient(1.0, scales, abs(scales) > 1e-30)
