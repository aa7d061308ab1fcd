"""Rounding to nearest: every block of every grid, and better than the plain recipe."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.nf4 import LEVELS
from edgellm.quant.rtn import CHUNK_VALUES, solve

AFFINE = [grid for grid in GRIDS.values() if grid.kind == "affine"]
CODED = [*AFFINE, GRIDS["int8-dynamic"], GRIDS["nf4"]]


def normal_rows(count: int, columns: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def plain(rows: np.ndarray, grid: Grid) -> np.ndarray:
    """Values rounded with the scale that just spans each block: the textbook's recipe."""
    top = 2 ** int(grid.bits) - 1
    blocks = rows.reshape(len(rows), -1, grid.block)
    if grid.symmetric:
        scale = np.abs(blocks).max(2, keepdims=True) / (top // 2)
        zero = np.float32((top + 1) // 2)
    else:
        low, high = blocks.min(2, keepdims=True), blocks.max(2, keepdims=True)
        scale = (high - low) / top
        zero = np.rint(-low / scale)
    codes = np.clip(np.rint(blocks / scale) + zero, 0, top)
    return ((codes - zero) * scale).reshape(rows.shape)


def error(rows: np.ndarray, values: np.ndarray) -> float:
    return float(np.square(rows - values).sum() / np.square(rows).sum())


@pytest.mark.parametrize("grid", CODED, ids=lambda grid: grid.name)
def test_shapes_dtypes_and_range(grid: Grid) -> None:
    rows = normal_rows(5)
    tensor = solve(rows, grid)
    blocks = 256 // grid.block if grid.block else 1
    assert tensor.codes is not None
    assert tensor.scales is not None
    assert (tensor.codes.shape, tensor.codes.dtype) == ((5, 256), np.uint8)
    assert tensor.codes.max() < 2**grid.bits
    assert (tensor.scales.shape, tensor.scales.dtype) == ((5, blocks), np.float32)
    assert (tensor.zeros is None) == (grid.symmetric or grid.minima)
    assert (tensor.mins is None) == (not grid.minima)
    if tensor.zeros is not None:
        assert tensor.zeros.shape == (5, blocks)
        assert tensor.zeros.max() < 2**grid.bits


@pytest.mark.parametrize(
    ("name", "gain"),
    [("int4-g32", 0.95), ("int4-g64", 0.94), ("int4-g128", 0.94), ("int4-g32-sym", 0.9)],
)
def test_the_search_beats_plain_rounding(name: str, gain: float) -> None:
    rows = normal_rows(64)
    values = dequantize(solve(rows, GRIDS[name]))
    assert error(rows, values) < gain * error(rows, plain(rows, GRIDS[name]))


@pytest.mark.parametrize("grid", AFFINE, ids=lambda grid: grid.name)
def test_no_small_change_of_a_scale_helps_much(grid: Grid) -> None:
    """The scale is the least-squares one for its codes, but for the last rounding."""
    rows = normal_rows(20)
    tensor = solve(rows, grid)
    values = dequantize(tensor)
    blocks, fitted = rows.reshape(-1, grid.block), values.reshape(-1, grid.block)
    best = (blocks * fitted).sum(1) / (fitted * fitted).sum(1)
    assert np.abs(best - 1).max() < 0.03


def test_an_outlier_costs_its_block_alone() -> None:
    rows = normal_rows(1)
    rows[0, 40] = 60.0
    values = dequantize(solve(rows, GRIDS["int4-g32"]))
    assert error(np.delete(rows, slice(32, 64), 1), np.delete(values, slice(32, 64), 1)) < 0.02
    assert values[0, 40] == pytest.approx(60.0, rel=0.1)


@pytest.mark.parametrize("grid", CODED, ids=lambda grid: grid.name)
def test_zero_rows_stay_zero_and_constants_stay_near(grid: Grid) -> None:
    rows = np.zeros((4, 256), np.float32)
    rows[1], rows[2], rows[3] = 0.37, -2.5, 1e-42
    values = dequantize(solve(rows, grid))
    assert (values[0] == 0).all()
    np.testing.assert_allclose(values[1:3], rows[1:3], rtol=1e-5)
    np.testing.assert_allclose(values[3], 0, atol=2e-42)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("grid", CODED, ids=lambda grid: grid.name)
def test_the_magnitude_does_not_matter(grid: Grid, scale: float) -> None:
    rows = normal_rows(8)
    values = dequantize(solve(rows, grid))
    scaled = dequantize(solve(rows * np.float32(scale), grid))
    assert np.isfinite(scaled).all()
    assert error(rows, scaled / np.float32(scale)) == pytest.approx(error(rows, values), rel=0.01)


@pytest.mark.parametrize("grid", CODED, ids=lambda grid: grid.name)
def test_rows_are_rounded_apart(grid: Grid) -> None:
    """The same bytes however the rows are grouped, across the chunks that are worked on at once."""
    rows = normal_rows(2 * CHUNK_VALUES // 256 + 3)
    whole = solve(rows, grid)
    parts = [solve(rows[start : start + 37], grid) for start in range(0, len(rows), 37)]
    for name in ("codes", "scales", "zeros"):
        values = getattr(whole, name)
        if values is not None:
            np.testing.assert_array_equal(
                values, np.concatenate([getattr(part, name) for part in parts])
            )


def test_nf4_takes_the_nearest_level() -> None:
    rows = normal_rows(6)
    tensor = solve(rows, GRIDS["nf4"])
    assert tensor.codes is not None
    blocks = rows.reshape(-1, 64)
    distances = np.abs(
        (blocks / np.abs(blocks).max(1, keepdims=True))[..., None] - LEVELS.astype(np.float64)
    )
    chosen = np.take_along_axis(distances, tensor.codes.reshape(-1, 64)[..., None], 2)[..., 0]
    assert (chosen <= distances.min(2) + 1e-7).all()
    assert tensor.codes.min() == 0 or tensor.codes.max() == 15


def test_a_block_full_of_its_own_grid_comes_back_exactly() -> None:
    """Codes 0 to 15 about a zero of 5: nothing is lost where nothing has to be."""
    rows = ((np.arange(32) % 16 - 5.0) * 0.25).astype(np.float32).reshape(1, -1)
    tensor = solve(rows, GRIDS["int4-g32"])
    np.testing.assert_allclose(dequantize(tensor), rows, rtol=0, atol=1e-6)
    assert tensor.zeros is not None
    assert tensor.zeros.tolist() == [[5]]
