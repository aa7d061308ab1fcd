"""Codes and scales bettered one after another by their exact effect on the output's error.

After GPTQ every weight has its code, and the error of a row is ``e @ H @ e``. With the gradient
``H @ e`` at hand it is known what a single weight would best be, all others being as they are; each
takes the nearest value that its group has, and each group then its best scale (``refit``), so that
the error never grows. For codes this is the coordinate descent of QuantEase (Behdin et al., arXiv
2309.01885, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.quant import arrays
from edgellm.quant.group_scales import FIXED_SCALES, GroupScales
from edgellm.quant.refit import refit_group, refit_super
from edgellm.quant.row_tiles import product
from edgellm.tensors import Array

SPAN_COLUMNS = 128
"""Columns whose changes are carried to the others at once, by one product."""


def refine(
    weights: Array,
    levels: Array,
    errors: Array,
    scales: GroupScales,
    hessian: Array,
    ridge: float,
    sweeps: int,
) -> None:
    """Better ``levels``, ``errors`` and ``scales`` in place, ``sweeps`` times over all columns.

    Arrays are tiles ``[tiles, columns, rows]``. ``errors`` are the values of ``levels`` less
    ``weights``, before and after. ``ridge`` is added to the diagonal of ``hessian``, as it was for
    the codes to begin with.
    """
    if not sweeps:
        return
    columns, group = weights.shape[1], scales.group
    diagonal = hessian.diagonal()
    # Dead columns take no part: in the end they get the values nearest to their weights.
    alive: Any = diagonal > 0
    added = arrays.where(alive, arrays.full_like(diagonal, ridge), 0.0)
    inverse = arrays.quotient(1.0, diagonal + added, alive)
    added = added[:, None]
    refits = scales.grid.name not in FIXED_SCALES
    inside = group <= SPAN_COLUMNS
    width = max(SPAN_COLUMNS, group * scales.groups_per_block) if inside else SPAN_COLUMNS
    gradient = product(hessian, errors)
    gradient += added * errors
    for _ in range(sweeps):
        for start in range(0, columns, width):
            part = slice(start, min(start + width, columns))
            span = _Span(
                start, weights[:, part], levels[:, part], errors[:, part], gradient[:, part],
                _part(hessian, part, added), inverse[part], scales,
                arrays.zeros_like(errors[:, part]), arrays.copy(errors[:, part]),
            )  # fmt: skip
            span.sweep(refits and inside)
            gradient += product(hessian[:, part], span.change)
            gradient[:, part] += added[part] * span.change
        if refits and not inside:
            for number in range(columns // group):
                part = slice(number * group, (number + 1) * group)
                own = _part(hessian, part, added)
                refit_group(scales, number, levels[:, part], gradient[:, part], own)
                renewed = scales.values(levels[:, part], number) - weights[:, part]
                change = renewed - errors[:, part]
                gradient += product(hessian[:, part], change)
                gradient[:, part] += added[part] * change
                errors[:, part] = renewed
    for column in np.flatnonzero(arrays.to_numpy(~alive)).tolist():
        found = scales.nearest(weights[:, column], column // group)
        levels[:, column] = found
        errors[:, column] = scales.values(found, column // group) - weights[:, column]


def _part(hessian: Array, part: slice, added: Array) -> Array:
    """A copy of the part of ``hessian`` on its diagonal, with what is added there."""
    own = arrays.copy(hessian[part, part])
    own.reshape(-1)[:: len(own) + 1] += added[part, 0]
    return own


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring columns, and what they have changed that the gradient does not know yet.

    ``hessian`` is the span's own part; all but it and ``inverse``, one over its diagonal, are views
    of tiles. ``change`` is ``errors - before``.
    """

    start: int
    weights: Array
    levels: Array
    errors: Array
    gradient: Array
    hessian: Array
    inverse: Array
    scales: GroupScales
    change: Array
    before: Array

    def sweep(self, refits: bool) -> None:
        columns, group = self.weights.shape[1], self.scales.group
        for first in range(0, columns, min(group, columns)):
            part = slice(first, min(first + group, columns))
            number = (self.start + first) // group
            for column in range(part.start, part.stop):
                self._recode(column, number)
            if refits:
                own = self.hessian[part, part]
                refit_group(self.scales, number, self.levels[:, part], self._slopes(part), own)
                self._renew(part, number)
        if refits and self.scales.outer is not None:
            width = group * self.scales.groups_per_block
            for first in range(0, columns, width):
                self._refit_super(slice(first, first + width))

    def _recode(self, column: int, number: int) -> None:
        """Give ``column`` the levels that are best with all others as they are."""
        slope = self.hessian[column] @ self.change
        slope += self.gradient[:, column]
        slope *= self.inverse[column]
        weights, errors = self.weights[:, column], self.errors[:, column]
        target = weights + errors
        target -= slope
        levels = self.scales.nearest(target, number)
        self.levels[:, column] = levels
        arrays.subtract(self.scales.values(levels, number), weights, errors)
        arrays.subtract(errors, self.before[:, column], self.change[:, column])

    def _slopes(self, part: slice) -> Array:
        """The gradient of ``part``, up to date."""
        slopes = product(self.hessian[part], self.change)
        slopes += self.gradient[:, part]
        return slopes

    def _renew(self, part: slice, number: int) -> None:
        """Let errors know that the scale of a group has moved."""
        values = self.scales.values(self.levels[:, part], number)
        arrays.subtract(values, self.weights[:, part], self.errors[:, part])
        arrays.subtract(self.errors[:, part], self.before[:, part], self.change[:, part])

    def _refit_super(self, part: slice) -> None:
        group, per_block = self.scales.group, self.scales.groups_per_block
        number = (self.start + part.start) // (group * per_block)
        own = self.hessian[part, part]
        refit_super(self.scales, number, self.levels[:, part], self._slopes(part), own)
        for place in range(per_block):
            first = part.start + place * group
            self._renew(slice(first, first + group), number * per_block + place)
