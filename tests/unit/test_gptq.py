"""GPTQ on every scalar grid: against a plain one in float64, against rounding, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from edgellm.errors import TensorError, UnsupportedTarget, UsageError
from edgellm.quant import ggml_blocks, gptq, imatrix, rtn
from edgellm.quant.dequantize import dequantize
from edgellm.quant.factor import factor, factor_of
from edgellm.quant.grid import GRIDS, QTensor
from edgellm.quant.group_scales import GroupScales
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.quant.row_tiles import from_tiles, to_tiles
from edgellm.quant.statistics import Statistics

COLUMNS = 256
SCALAR = [
    name
    for name, grid in GRIDS.items()
    if grid.kind != "float" and name not in VECTOR_CODEBOOKS and name != "nf4-dq"
]


def statistics_of(inputs: np.ndarray) -> Statistics:
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return Statistics(hessian, np.abs(inputs).max(axis=0), len(inputs))


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Of inputs that depend on one another, with a few large channels, as a network's do."""
    rng = np.random.default_rng(7)
    mixed = rng.standard_normal((12_800, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))
    inputs = mixed / COLUMNS**0.5 + rng.standard_normal((12_800, COLUMNS)) * 0.3
    inputs *= np.exp(rng.standard_normal(COLUMNS) * 0.7)
    return statistics_of(inputs.astype(np.float32))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    values = np.random.default_rng(8).standard_normal((70, COLUMNS)).astype(np.float32) * 0.05
    values[3] = 0
    values[5, ::17] *= 20
    return values


@pytest.fixture(scope="module")
def solved(rows, statistics) -> Callable[[str], QTensor]:
    """The rows on the grid of a name, each solved once."""
    return cache(lambda name: gptq.solve(rows, GRIDS[name], statistics))


def output_error(tensor: QTensor, rows: np.ndarray, statistics: Statistics) -> np.ndarray:
    off = dequantize(tensor).astype(np.float64) - rows
    return np.einsum("ri,ij,rj->r", off, statistics.hessian.astype(np.float64), off)


@pytest.mark.parametrize("name", [*SCALAR, "nf4-dq"])
def test_output_error_is_well_below_that_of_weighted_rounding(
    name, rows, statistics, solved
) -> None:
    found = output_error(solved(name), rows, statistics)
    begun = imatrix.fitted(rows, GRIDS[name], statistics.importance)
    rounded = output_error(begun, rows, statistics)
    some = rounded > 0
    assert np.all(found[~some] == 0)
    assert np.all(found[some] < rounded[some])
    assert np.median(found[some] / rounded[some]) < 0.65


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-sym", "int8", "nf4"])
def test_output_error_is_below_that_of_plain_rounding(name, rows, statistics, solved) -> None:
    found = output_error(solved(name), rows, statistics)
    rounded = output_error(rtn.solve(rows, GRIDS[name]), rows, statistics)
    assert found.sum() < 0.6 * rounded.sum()


@pytest.mark.parametrize("name", SCALAR)  # nf4-dq rounds the scales of all rows together
def test_a_row_is_the_same_whatever_rows_come_with_it(name, rows, statistics, solved) -> None:
    grid = GRIDS[name]
    whole = fields_of(solved(name))
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = fields_of(gptq.solve(rows[order], grid, statistics))
    parts = [fields_of(gptq.solve(rows[s], grid, statistics)) for s in (slice(0, 9), slice(9, 70))]
    for field, values in whole.items():
        np.testing.assert_array_equal(values[order], shuffled[field], err_msg=field)
        joined = np.concatenate([part[field] for part in parts])
        np.testing.assert_array_equal(values, joined, err_msg=field)


def fields_of(tensor: QTensor) -> dict[str, np.ndarray]:
    found = {
        "codes": tensor.codes, "scales": tensor.scales, "zeros": tensor.zeros, "mins": tensor.mins,
    }  # fmt: skip
    if tensor.supers is not None:
        found |= {
            "d": tensor.supers.scales, "scale_codes": tensor.supers.scale_codes,
            "dmin": tensor.supers.mins, "min_codes": tensor.supers.min_codes,
        }  # fmt: skip
    return {field: values for field, values in found.items() if values is not None}


@pytest.mark.parametrize("name", [name for name in SCALAR if GRIDS[name].kind == "ggml"])
def test_ggml_tensors_are_exactly_what_their_blocks_can_hold(name, solved) -> None:
    tensor = solved(name)
    read = ggml_blocks.unpack(ggml_blocks.pack(tensor), tensor.grid)
    np.testing.assert_array_equal(dequantize(read), dequantize(tensor))
    for field, values in fields_of(tensor).items():
        np.testing.assert_array_equal(fields_of(read)[field], values, err_msg=field)


@pytest.mark.parametrize("name", SCALAR)
def test_codes_and_zeros_are_in_range_and_scales_keep_their_sign(
    name, rows, statistics, solved
) -> None:
    grid, tensor = GRIDS[name], solved(name)
    begun = imatrix.fitted(rows, grid, statistics.importance)
    assert tensor.codes.max() < 2**grid.bits
    if name in ("q8_0", "int8-dynamic"):
        assert tensor.codes.min() >= 1  # no kernel has to negate -128
    if tensor.zeros is not None:
        assert tensor.zeros.max() < 2**grid.bits
    if tensor.supers is None:
        np.testing.assert_array_equal(np.sign(tensor.scales), np.sign(begun.scales))
    assert np.all(np.isfinite(tensor.scales))


def plain_gptq(
    rows: np.ndarray, begun: QTensor, hessian: np.ndarray, order: np.ndarray, damping: float
) -> np.ndarray:
    """Values by Frantar et al., arXiv 2210.17323, algorithm 1, unblocked, in float64."""
    grid = begun.grid
    columns = rows.shape[1]
    damped = hessian.astype(np.float64)
    damped[np.diag_indices(columns)] += damping * np.mean(np.diag(damped))
    damped = damped[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = rows.astype(np.float64)[:, order]
    values = np.empty_like(left)
    for column, place in enumerate(order):
        scale, low = begun.scales[:, place // grid.group].astype(np.float64), None
        if begun.mins is not None:
            low = begun.mins[:, place // grid.group]
        target = left[:, column] - (0 if low is None else low)
        top = 15 if low is not None else 7
        codes = np.clip(np.rint(target / np.where(scale == 0, 1, scale)), top - 15, top)
        values[:, column] = codes * scale + (0 if low is None else low)
        error = (left[:, column] - values[:, column]) / upper[column, column]
        left[:, column:] -= np.outer(error, upper[column, column:])
    result = np.empty_like(values)
    result[:, order] = values
    return result


@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
@pytest.mark.parametrize("ordered", [True, False])
def test_codes_equal_those_of_a_plain_gptq(name, ordered, rows, statistics) -> None:
    hessian = statistics.hessian
    if not ordered:  # channels sorted beforehand: the order of solving is then the channels' own
        sorting = np.argsort(-hessian.diagonal(), kind="stable")
        hessian = np.ascontiguousarray(hessian[np.ix_(sorting, sorting)])
    found = factor(hessian)
    if not ordered:
        np.testing.assert_array_equal(found.order, np.arange(COLUMNS))
    begun = imatrix.fitted(rows, GRIDS[name], hessian.diagonal().copy())
    scales = GroupScales(begun)
    levels, errors = gptq.feed_forward(to_tiles(rows), scales, found)
    tensor = scales.finished(levels, len(rows))
    wanted = plain_gptq(rows, begun, hessian, found.order, found.damping)
    assert np.mean(np.abs(dequantize(tensor) - wanted) < 1e-6) > 0.999
    np.testing.assert_allclose(
        from_tiles(errors, len(rows)), dequantize(tensor) - rows, rtol=0, atol=1e-7
    )


def test_dead_channels_take_no_part(rows, statistics) -> None:
    dead = np.zeros(COLUMNS, bool)
    dead[[0, 9, 130, COLUMNS - 1]] = True
    hessian = statistics.hessian.copy()
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = factor(hessian)
    assert found.dead == 4
    living = COLUMNS - 4
    assert set(found.order[living:]) == set(np.flatnonzero(dead))
    assert not found.feedback[living:].any()
    assert not found.feedback[:, living:].any()
    alone = factor(np.ascontiguousarray(hessian[np.ix_(~dead, ~dead)]))
    np.testing.assert_array_equal(found.feedback[:living, :living], alone.feedback)
    tensor = gptq.solve(rows, GRIDS["int4-g32"], Statistics(hessian, statistics.largest, 1))
    values = dequantize(tensor)
    # Nothing was fed to a dead channel: its weights have the nearest value that their group holds.
    nearest = GroupScales(tensor).nearest(to_tiles(rows)[:, 9], 0)
    np.testing.assert_array_equal(
        values[:, 9], from_tiles(GroupScales(tensor).values(nearest, 0)[:, None], len(rows))[:, 0]
    )


def test_inputs_that_are_all_zero_round_plainly(rows) -> None:
    nothing = Statistics(np.zeros((COLUMNS, COLUMNS), np.float32), np.zeros(COLUMNS), 5)
    assert factor_of(nothing).dead == COLUMNS
    tensor = gptq.solve(rows, GRIDS["q4_0"], nothing)
    assert np.abs(dequantize(tensor) - rows).max() <= np.abs(tensor.scales).max()


def test_damping_rises_where_the_hessian_is_singular_and_says_so(statistics) -> None:
    usual = factor(statistics.hessian)
    assert (usual.damping, usual.raised) == (0.01, False)
    assert usual.ridge == pytest.approx(0.01 * statistics.hessian.diagonal().mean())
    inputs = np.random.default_rng(9).standard_normal((900, COLUMNS)).astype(np.float32)
    hessian = statistics_of(inputs).hessian
    least, directions = np.linalg.eigh(hessian)
    away = np.outer(directions[:, 0], directions[:, 0])
    for below, damping in ((0.05, 0.1), (0.5, 1.0)):
        found = factor(hessian - np.float32(least[0] + below) * away)
        assert (found.damping, found.raised) == (pytest.approx(damping), True)
    with pytest.raises(TensorError, match="singular even with the mean of its diagonal"):
        factor(hessian - np.float32(least[0] + 5) * away)


def test_the_factor_is_computed_once_for_weights_that_share_an_input(statistics) -> None:
    assert factor_of(statistics) is factor_of(statistics)


@pytest.mark.parametrize(("place", "named"), [((4, 4), "channel 4"), ((4, 9), "product of two")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_refused(place, named, value, rows, statistics) -> None:
    hessian = statistics.hessian.copy()
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(TensorError, match=named):
        gptq.solve(rows, GRIDS["q4_0"], Statistics(hessian, statistics.largest, 1))


def test_what_does_not_fit_is_refused(rows, statistics) -> None:
    with pytest.raises(UsageError, match="calibrate first"):
        gptq.solve(rows, GRIDS["q4_0"], None)
    with pytest.raises(UnsupportedTarget, match="rtn:f16"):
        gptq.solve(rows, GRIDS["f16"], statistics)
    with pytest.raises(TensorError, match="256 inputs are given for rows of 128"):
        gptq.solve(rows[:, :128], GRIDS["q4_0"], statistics)
    diagonal = Statistics(statistics.importance, statistics.largest, 1)
    with pytest.raises(TensorError, match="diagonal alone"):
        gptq.solve(rows, GRIDS["q4_0"], diagonal)


def test_vector_codebooks_are_rounded_by_importance(rows, statistics) -> None:
    found = gptq.solve(rows, GRIDS["iq3_s"], statistics)
    wanted = imatrix.solve(rows, GRIDS["iq3_s"], statistics)
    np.testing.assert_array_equal(found.packed, wanted.packed)
