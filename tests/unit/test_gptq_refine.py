"""Scales refitted and codes gone over again: never worse, and the best there is."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.quant import gptq, imatrix
from edgellm.quant.factor import factor
from edgellm.quant.grid import GRIDS
from edgellm.quant.group_scales import GroupScales
from edgellm.quant.refine import refine
from edgellm.quant.refit import refit_group, refit_super
from edgellm.quant.row_tiles import to_tiles

ROWS, COLUMNS = 64, 256
GRID_NAMES = [
    "int8-dynamic", "int4-g32", "int4-g64-sym", "nf4", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k",
    "q6_k", "iq4_xs",
]  # fmt: skip


class Case:
    """Rows solved by GPTQ, with the error of each at hand."""

    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(11)
        inputs = rng.standard_normal((900, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))
        inputs = (inputs / COLUMNS**0.5).astype(np.float32)
        self.hessian = inputs.T @ inputs / np.float32(900)
        rows = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) + np.float32(0.2)
        self.weights = to_tiles(rows)
        start = imatrix.fitted(rows, GRIDS[name], self.hessian.diagonal().copy())
        self.scales = GroupScales(start)
        self.levels, self.errors = gptq.feed_forward(
            self.weights, self.scales, factor(self.hessian)
        )

    def values(self) -> np.ndarray:
        group = self.scales.group
        return np.concatenate(
            [
                self.scales.values(self.levels[:, number * group : (number + 1) * group], number)
                for number in range(COLUMNS // group)
            ],
            axis=1,
        )

    def error(self) -> np.ndarray:
        """Of each row, float64 ``[rows]``."""
        off = (self.values().astype(np.float64) - self.weights)[0]
        return np.einsum("ir,ij,jr->r", off, self.hessian.astype(np.float64), off)

    def slopes(self) -> np.ndarray:
        return np.matmul(self.hessian, self.values() - self.weights)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_each_sweep_lowers_the_error_of_every_row_and_keeps_account(name) -> None:
    case = Case(name)
    before = case.error()
    for least in (0.999, 1.0, 1.0):
        refine(case.weights, case.levels, case.errors, case.scales, case.hessian, 0.0, 1)
        after = case.error()
        assert np.all(after <= before * (1 + 1e-5))
        assert after.sum() < least * before.sum()
        before = after
        np.testing.assert_array_equal(case.errors, case.values() - case.weights)


@pytest.mark.parametrize("name", ["int4-g64-sym", "nf4", "q4_0", "iq4_xs", "q3_k"])
def test_a_refitted_scale_is_the_best_of_all_that_lie_near(name) -> None:
    case = Case(name)
    part = slice(case.scales.group, 2 * case.scales.group)
    refit_group(
        case.scales, 1, case.levels[:, part], case.slopes()[:, part], case.hessian[part, part]
    )
    best, chosen = case.error(), case.scales.scales[:, 1].copy()
    for factor_ in (0.9, 0.97, 0.99, 0.999, 1.001, 1.01, 1.03, 1.1):
        case.scales.set_scales(1, case.scales.storable(chosen * np.float32(factor_), 1))
        assert np.all(case.error() >= best * (1 - 1e-6))


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q2_k"])
def test_a_refitted_minimum_is_the_best_beside_its_scale(name) -> None:
    case = Case(name)
    begun = case.error()
    part = slice(case.scales.group, 2 * case.scales.group)
    refit_group(
        case.scales, 1, case.levels[:, part], case.slopes()[:, part], case.hessian[part, part]
    )
    best, chosen = case.error(), case.scales.mins[:, 1].copy()
    moved = best < begun
    assert np.all(best <= begun)
    assert moved.any()
    for step in (-0.5, -0.1, -0.01, 0.01, 0.1, 0.5):
        wanted = chosen + np.float32(step) * case.scales.scales[:, 1]
        case.scales.mins[:, 1] = case.scales.storable_mins(wanted, 1)
        assert np.all(case.error()[moved] >= best[moved] * (1 - 1e-6))


def test_a_refitted_zero_takes_its_levels_along() -> None:
    case = Case("int4-g32")
    fitting = case.error()
    # Zeros one too high, so that all values of the group are too low by a step.
    group = slice(32, 64)
    case.scales.zeros[:, 1] += 1
    case.levels[:, group] -= 1
    codes = case.levels[:, group] + case.scales.zeros[:, 1:2]
    begun = case.error()
    refit_group(
        case.scales, 1, case.levels[:, group], case.slopes()[:, group], case.hessian[group, group]
    )
    np.testing.assert_array_equal(case.levels[:, group] + case.scales.zeros[:, 1:2], codes)
    assert case.error().sum() < 0.9 * begun.sum()
    assert np.all(case.error() <= fitting * (1 + 1e-5))


@pytest.mark.parametrize("name", ["q3_k", "q4_k", "q6_k"])
def test_a_super_block_keeps_its_codes_while_its_scale_moves(name) -> None:
    case = Case(name)
    fitting, codes = case.error(), case.scales.scale_codes()
    case.scales.outer[:, 0] = case.scales.storable_outer(case.scales.outer[:, 0] * np.float32(1.2))
    case.scales.set_scales(slice(None), case.scales.outer[:, 0, None] * codes)
    begun = case.error()
    refit_super(case.scales, 0, case.levels, case.slopes(), case.hessian)
    np.testing.assert_array_equal(case.scales.scale_codes(), codes)
    assert np.all(case.error() < begun)
    assert np.all(case.error() <= fitting * (1 + 1e-5))
