"""Scales for codes that stay: the best that can be stored, by the error of the layer's output.

For fixed codes the error of a row is a quadratic in each scale, minimum or zero, so that the best
value follows exactly from the gradient ``H @ e`` of the errors ``e``: least squares with the whole
Hessian, where the search that scales begin with had its diagonal. What is found is rounded as it is
stored and kept only where the error falls.

Arrays are tiles (``row_tiles``); ``levels`` and ``slopes`` (the gradient) are a group's or a
super-block's, ``[tiles, columns, rows]``, ``hessian`` is its part ``[columns, columns]``. Values
move along ``c``, the levels, and along ``d``, what a minimum or zero is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgellm.quant import arrays
from edgellm.quant.arrays import Mask, quotient, where
from edgellm.quant.group_scales import GroupScales
from edgellm.quant.row_tiles import product
from edgellm.tensors import Array

TOLD_APART = 1e-5
"""Part of ``cHc * dHd`` that has to be left of it once ``cHd ** 2`` is taken off: below, ``c`` and
``d`` are the same direction but for float32's rounding, and only ``c`` is followed."""


@dataclass(frozen=True, slots=True)
class Forms:
    """The error's quadratic and linear forms along ``c`` and ``d``, each ``[tiles, rows]``."""

    c_c: Array
    c_slope: Array
    c_d: Array
    d_d: Array
    d_slope: Array

    @classmethod
    def of_one(cls, c: Array, slopes: Array, hessian: Array) -> Forms:
        """Along ``c`` ``[tiles, columns, rows]`` alone."""
        none = arrays.zeros_like(c[:1, 0, :1])
        c_c = (c * product(hessian, c)).sum(axis=1)
        return cls(c_c, (c * slopes).sum(axis=1), none, none, none)

    @classmethod
    def of_two(cls, c: Array, d: Array, slopes: Array, hessian: Array) -> Forms:
        """Along ``c`` and ``d``, both ``[tiles, columns, rows]``."""
        one, hessian_d = cls.of_one(c, slopes, hessian), product(hessian, d)
        c_d, d_d = (c * hessian_d).sum(axis=1), (d * hessian_d).sum(axis=1)
        return cls(one.c_c, one.c_slope, c_d, d_d, (d * slopes).sum(axis=1))

    @classmethod
    def with_ones(cls, c: Array, slopes: Array, hessian: Array) -> Forms:
        """Along ``c`` and a column of ones."""
        one, sums = cls.of_one(c, slopes, hessian), hessian.sum(axis=1)[:, None]
        c_d, d_d = (c * sums).sum(axis=1), sums.sum().reshape(1, 1)
        return cls(one.c_c, one.c_slope, c_d, d_d, slopes.sum(axis=1))

    def growth(self, step_c: Array, step_d: Array) -> Array:
        """How much the error grows when values move by ``step_c * c + step_d * d``."""
        grown: Array = step_c * (2 * self.c_slope + step_c * self.c_c + 2 * step_d * self.c_d)
        grown += step_d * (2 * self.d_slope + step_d * self.d_d)
        return grown

    def best(self) -> tuple[Array, Array, Mask]:
        """The best steps along both, and where ``d`` is to be followed at all."""
        left = self.c_c * self.d_d - self.c_d * self.c_d
        both = left > TOLD_APART * self.c_c * self.d_d
        pair_c = quotient(self.c_d * self.d_slope - self.d_d * self.c_slope, left, both)
        pair_d = quotient(self.c_d * self.c_slope - self.c_c * self.d_slope, left, both)
        alone = quotient(-self.c_slope, self.c_c, self.c_c > 0)
        return where(both, pair_c, alone), pair_d, both

    def best_d(self, step_c: Array, both: Mask) -> Array:
        """The best step along ``d`` beside a given one along ``c``."""
        return quotient(-self.d_slope - step_c * self.c_d, self.d_d, both)


def refit_group(
    scales: GroupScales, number: int, levels: Array, slopes: Array, hessian: Array
) -> None:
    """Move the scale of group ``number``, with its minimum or zero; a zero takes ``levels`` along.

    A scale neither vanishes nor changes its sign, unless it is one code among others.
    """
    old = scales.scales[:, number]
    any_sign = scales.outer is not None

    def store(wanted: Array) -> Array:
        return scales.storable(wanted, number)

    if scales.zeros is not None:
        _refit_zero(scales, number, levels, slopes, hessian)
    elif scales.mins is not None:
        forms = Forms.with_ones(levels, slopes, hessian)
        new, scales.mins[:, number] = _best_pair(
            forms, old, scales.mins[:, number], store,
            lambda wanted: scales.storable_mins(wanted, number), any_sign,
        )  # fmt: skip
        scales.set_scales(number, new)
    else:
        forms = Forms.of_one(levels, slopes, hessian)
        scales.set_scales(number, _best_scale(forms, old, store, any_sign))


def refit_super(
    scales: GroupScales, number: int, levels: Array, slopes: Array, hessian: Array
) -> None:
    """Move the scale of super-block ``number`` and that of its minima; small codes stay."""
    assert scales.outer is not None
    per_block, group = scales.groups_per_block, scales.group
    groups = slice(number * per_block, (number + 1) * per_block)
    codes = scales.scale_codes(groups)
    c = levels * arrays.repeat(codes, group)
    old = scales.outer[:, number]
    if scales.outer_mins is None or scales.mins is None:
        forms = Forms.of_one(c, slopes, hessian)
        new = _best_scale(forms, old, scales.storable_outer, False)
    else:
        min_codes = scales.min_codes(groups)
        forms = Forms.of_two(c, -arrays.repeat(min_codes, group), slopes, hessian)
        old_min = scales.outer_mins[:, number]
        new, new_min = _best_pair(
            forms, old, old_min, scales.storable_outer, scales.storable_outer, False
        )
        scales.outer_mins[:, number] = new_min
        scales.mins[:, groups] = -(new_min[:, None] * min_codes)
    scales.outer[:, number] = new
    scales.set_scales(groups, new[:, None] * codes)


Store = Callable[[Array], Array]


def _best_scale(forms: Forms, old: Array, store: Store, any_sign: bool) -> Array:
    new = store(old + quotient(-forms.c_slope, forms.c_c, forms.c_c > 0))
    grown = forms.growth(new - old, arrays.zeros_like(old))
    return where((grown < 0) & _allowed(old, new, any_sign), new, old)


def _best_pair(
    forms: Forms, old: Array, old_min: Array, store: Store, store_min: Store, any_sign: bool
) -> tuple[Array, Array]:
    """The scale, and then the minimum that is best with the scale as it is stored."""
    step, _, both = forms.best()
    new = store(old + step)
    step = new - old
    new_min = where(both, store_min(old_min + forms.best_d(step, both)), old_min)
    better = (forms.growth(step, new_min - old_min) < 0) & _allowed(old, new, any_sign)
    return where(better, new, old), where(better, new_min, old_min)


def _refit_zero(
    scales: GroupScales, number: int, levels: Array, slopes: Array, hessian: Array
) -> None:
    """As it is and as two free parameters would have it: the better zero, with its own best scale.

    A zero that is lower by ``shift`` makes all levels higher by it: values are then ``c + shift``
    times the scale.
    """
    assert scales.zeros is not None
    forms = Forms.with_ones(levels, slopes, hessian)
    old, zeros = scales.scales[:, number], scales.zeros[:, number]
    step, step_ones, both = forms.best()
    wanted = old + step
    moved = arrays.rounded(quotient(step_ones, wanted, both & (wanted > 0)))
    moved = arrays.within(moved, zeros - scales.highest, zeros - scales.lowest)
    best, best_shift, best_growth = old, arrays.zeros_like(old), arrays.zeros_like(old)
    for shift in (arrays.zeros_like(old), moved):
        power = forms.c_c + shift * (2 * forms.c_d + shift * forms.d_d)
        against = old * (forms.c_c + shift * forms.c_d) - forms.c_slope - shift * forms.d_slope
        new = scales.storable(quotient(against, power, power > 0), number)
        grown = forms.growth(new - old, new * shift)
        better = (grown < best_growth) & _allowed(old, new, False)
        best = where(better, new, best)
        best_shift = where(better, shift, best_shift)
        best_growth = where(better, grown, best_growth)
    zeros -= best_shift
    levels += best_shift[:, None]
    scales.set_scales(number, best)


def _allowed(old: Array, new: Array, any_sign: bool) -> Mask:
    kept: Mask = new * old > 0
    return kept | any_sign
