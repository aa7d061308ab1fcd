"""Weighted rounding: less weighted error than ggml's own search and than plain rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgellm.errors import TensorError, UnsupportedTarget, UsageError
from edgellm.quant import floats, ggml, ggml_blocks, imatrix, rtn
from edgellm.quant.dequantize import dequantize
from edgellm.quant.ggml_types import NAMED
from edgellm.quant.grid import GRIDS, Grid, QTensor
from edgellm.quant.levels import VECTOR_CODEBOOKS, levels_of
from edgellm.tensors import Array

GGML = [*ggml_blocks.LAYOUTS]
OTHERS = [
    replace(grid, scale_dtype=dtype)
    for grid in GRIDS.values()
    if grid.kind in ("affine", "per_channel", "codebook") and grid.name != "nf4-dq"
    for dtype in (("f32", "f16", "bf16") if grid.name.startswith("int4-g64") else ("f32",))
]
SCALAR = [*(GRIDS[name] for name in GGML), *OTHERS]


def ids(grid: Grid) -> str:
    return f"{grid.name}-{grid.scale_dtype}"


def rows_and_importance(rows: int = 24, columns: int = 512) -> tuple[Array, Array]:
    random = np.random.default_rng(9)
    weights = random.standard_t(6, (rows, columns)).astype(np.float32)
    weights *= np.exp(0.5 * random.standard_normal((rows, 1)))
    return weights, np.exp(1.5 * random.standard_normal(columns)).astype(np.float32)


def weighted_error(tensor: QTensor, rows: Array, importance: Array) -> float:
    off = (dequantize(tensor) - rows).astype(np.float64)
    return float((off * off * importance).sum())


@pytest.mark.parametrize("name", GGML)
def test_the_search_is_better_than_ggmls_own_by_weighted_error(name: str) -> None:
    rows, importance = rows_and_importance()
    grid = GRIDS[name]
    packed = ggml.quantize(rows, grid, importance).packed
    assert packed is not None
    theirs = weighted_error(ggml_blocks.unpack(packed, grid), rows, importance)
    ours = weighted_error(imatrix.fitted(rows, grid, importance), rows, importance)
    assert ours <= (1.0 if name == "q8_0" else 0.98) * theirs


@pytest.mark.parametrize("grid", OTHERS, ids=ids)
def test_the_search_is_better_than_plain_rounding_by_weighted_error(grid: Grid) -> None:
    rows, importance = rows_and_importance()
    plain = weighted_error(rtn.solve(rows, grid), rows, importance)
    solved = imatrix.solve(rows, grid, imatrix.Importance(importance))
    assert weighted_error(solved, rows, importance) <= (1 if grid.bits == 8 else 0.85) * plain


@pytest.mark.parametrize("grid", SCALAR, ids=ids)
def test_without_importance_the_squared_error_is_no_larger_than_plain(grid: Grid) -> None:
    rows, _ = rows_and_importance()
    same = np.ones(rows.shape[1], np.float32)
    if grid.kind == "ggml":
        packed = ggml.quantize(rows, grid).packed
        assert packed is not None
        plain = ggml_blocks.unpack(packed, grid)
    else:
        plain = rtn.solve(rows, grid)
    ours = weighted_error(imatrix.fitted(rows, grid), rows, same)
    assert ours <= weighted_error(plain, rows, same)


@pytest.mark.parametrize("grid", SCALAR, ids=ids)
def test_codes_are_the_nearest_for_scales_as_they_are_stored(grid: Grid) -> None:
    rows, importance = rows_and_importance()
    rows[3], rows[4, :300], rows[5] = 0, 0, 1e-36
    rows[6, 40], rows[7] = 3e4, np.abs(rows[7])
    importance[:64] = 0
    tensor = imatrix.fitted(rows, grid, importance)
    assert tensor.codes is not None
    assert tensor.scales is not None
    values = dequantize(tensor)
    assert np.isfinite(values).all()
    assert not values[3].any()
    best = np.abs(values - rows)
    # q8_0 and int8-dynamic leave the lowest level out, as ggml and onnxruntime's kernels want.
    spare = 1 if grid.name in ("q8_0", "int8-dynamic") else 0
    for move in (-1, 1):
        moved = tensor.codes.astype(np.int16) + move
        inside = (moved >= spare) & (moved < len(levels_of(grid)))
        other = dequantize(
            replace(tensor, codes=np.where(inside, moved, tensor.codes).astype(np.uint8))
        )
        slack = 1e-6 * np.abs(rows) + 1e-30
        assert (best <= np.abs(other - rows) + slack).all()
    if grid.kind == "ggml":
        packed = ggml_blocks.pack(tensor)
        np.testing.assert_array_equal(ggml.dequantize(packed, NAMED[grid.name]), values)
    else:
        np.testing.assert_array_equal(
            floats.rounded(tensor.scales, grid.scale_dtype), tensor.scales
        )


@pytest.mark.parametrize("grid", SCALAR, ids=ids)
def test_rows_are_solved_apart(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, importance = rows_and_importance(columns=256)
    whole = imatrix.fitted(rows, grid, importance)
    for size in (1, 7):
        monkeypatch.setattr(imatrix, "CHUNK_VALUES", 256 * size)
        for part in (imatrix.fitted(rows, grid, importance), whole):
            for field in ("codes", "scales", "zeros", "mins"):
                np.testing.assert_array_equal(getattr(part, field), getattr(whole, field))
        alone = imatrix.fitted(rows[8 : 8 + size], grid, importance)
        assert whole.codes is not None
        np.testing.assert_array_equal(alone.codes, whole.codes[8 : 8 + size])


def test_a_blocks_of_channels_that_were_always_zero_is_rounded_too() -> None:
    rows, importance = rows_and_importance()
    importance[:256] = 0
    for name in ("q4_0", "q4_k", "q3_k", "iq4_xs"):
        solved = imatrix.solve(rows, GRIDS[name], imatrix.Importance(importance))
        off = dequantize(solved)[:, :256] - rows[:, :256]
        assert (off**2).mean() < 0.05 * (rows[:, :256] ** 2).mean()
    assert imatrix.lifted(np.zeros(3, np.float32)).tolist() == [1, 1, 1]
    assert imatrix.lifted(np.asarray([0, 4, 2], np.float32)).tolist() == [2, 4, 2]


def test_floats_are_only_rounded() -> None:
    rows, importance = rows_and_importance()
    solved = imatrix.solve(rows, GRIDS["bf16"], imatrix.Importance(importance)).packed
    np.testing.assert_array_equal(solved, floats.encode(rows, GRIDS["bf16"]).packed)


def test_what_it_cannot_do_is_refused() -> None:
    rows, importance = rows_and_importance()
    with pytest.raises(UsageError, match="calibrate first"):
        imatrix.solve(rows, GRIDS["q4_0"], None)
    for name in (*VECTOR_CODEBOOKS, "f16"):
        with pytest.raises(UnsupportedTarget, match=f"{name} has no codes"):
            imatrix.fitted(rows, GRIDS[name], importance)
    for name in ("q4_0", "q4_k", "int4-g32", "int8"):
        with pytest.raises(TensorError, match=r"\[256\] is given for rows of 512"):
            imatrix.fitted(rows, GRIDS[name], importance[:256])
        with pytest.raises(TensorError, match="got nan"):
            imatrix.fitted(rows, GRIDS[name], np.where(importance > 1, np.nan, importance))


@pytest.mark.parametrize("name", GGML)
def test_a_value_beyond_f16_scales_is_refused(name: str) -> None:
    rows, importance = rows_and_importance()
    rows[2, 5] = 1e6
    with pytest.raises(TensorError, match=f"1e\\+06 does not fit {name}"):
        imatrix.fitted(rows, GRIDS[name], importance)
