"""Tensor references: columns, transposes, stacks, and the search for NaN and Inf."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from edgellm.architectures.row_order import FusedHeads
from edgellm.errors import TensorError
from edgellm.tensors import (
    COLUMN_CHUNK_BYTES,
    Array,
    TensorRef,
    check_finite,
    constant,
    derived,
    reordered,
    stacked_rows,
    transposed,
)

MATRIX = np.arange(35, dtype=np.float32).reshape(7, 5)


def test_columns_equal_those_of_the_whole() -> None:
    np.testing.assert_array_equal(constant("x", MATRIX).load_columns(1, 4), MATRIX[:, 1:4])


def test_a_transpose_equals_numpys_and_turns_back() -> None:
    ref = transposed(constant("x", MATRIX))
    assert ref.shape == (5, 7)
    np.testing.assert_array_equal(ref.load(), MATRIX.T)
    np.testing.assert_array_equal(ref.load(2, 4), MATRIX.T[2:4])
    np.testing.assert_array_equal(ref.load_columns(3, 6), MATRIX.T[:, 3:6])
    np.testing.assert_array_equal(transposed(ref).load(1, 5), MATRIX[1:5])
    assert ref.load(0, 2).flags.c_contiguous


def test_a_transpose_of_more_than_one_strip() -> None:
    matrix = np.arange(150 * 3, dtype=np.float32).reshape(150, 3)
    np.testing.assert_array_equal(transposed(constant("x", matrix)).load(1, 3), matrix.T[1:3])


def test_a_vector_has_no_transpose() -> None:
    with pytest.raises(ValueError, match="shape"):
        transposed(constant("x", np.zeros(3)))


def test_changes_reach_the_columns_too() -> None:
    """A quick way to the source's columns must not outlive a change of its rows."""
    source = transposed(constant("x", MATRIX.T))
    assert source.column_loader is not None
    changed = derived(source, lambda rows: rows + np.float32(1))
    np.testing.assert_array_equal(changed.load_columns(0, 2), MATRIX[:, :2] + 1)
    order = np.array([1, 0, 3, 2, 5, 4, 6])
    np.testing.assert_array_equal(reordered(source, order).load_columns(0, 2), MATRIX[order][:, :2])


def test_rows_in_another_order_are_loaded_run_by_run() -> None:
    """And a vector's values are its rows."""
    order = FusedHeads(kv_heads=3, group=2, head_dim=20).places()
    loads: list[tuple[int, int]] = []
    table = np.arange(2.0 * len(order), dtype=np.float32).reshape(-1, 2)
    ref = constant("x", table)

    def watched(start: int, stop: int) -> Array:
        loads.append((start, stop))
        return ref.load_rows(start, stop)

    found = reordered(replace(ref, load_rows=watched), order).load(35, 90)
    np.testing.assert_array_equal(found, table[order][35:90])
    assert loads == [(35, 40), (80, 120), (160, 170)]
    vector = constant("b", table[:, 0])
    np.testing.assert_array_equal(reordered(vector, order).load(), table[np.newaxis, order, 0])


def test_stacked_parts_are_one_matrix() -> None:
    parts = [constant("a", MATRIX[:3]), constant("b", MATRIX[3:])]
    for start, stop in ((0, 7), (2, 5), (0, 3), (3, 7)):
        np.testing.assert_array_equal(stacked_rows(parts, start, stop), MATRIX[start:stop])


def test_the_damaged_part_of_a_stack_is_named() -> None:
    damaged = MATRIX[3:].copy()
    damaged[1, 2] = np.nan
    parts = [constant("a", MATRIX[:3]), constant("b", damaged)]
    stacked_rows(parts, 0, 4)
    with pytest.raises(TensorError, match="tensor b holds nan at row 1, column 2"):
        stacked_rows(parts, 2, 6)


def test_columns_of_a_large_tensor_take_little_memory() -> None:
    rows, columns = 4096, 4096  # 64 MB, never there at once

    def load_rows(start: int, stop: int) -> Array:
        return np.full((stop - start, columns), 1.0, np.float32)

    ref = TensorRef("x", "x", (rows, columns), "f32", 4 * rows * columns, load_rows)
    tracemalloc.start()
    try:
        result = transposed(ref).load(0, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.shape == (64, rows)
    assert peak < 2 * result.nbytes + 2 * COLUMN_CHUNK_BYTES + (1 << 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(value: float) -> None:
    rows = np.ones((4, 8), np.float32)
    rows[2, 5] = value
    with pytest.raises(TensorError, match=rf"blk\.0\.x holds {value} at row 102, column 5"):
        check_finite(rows, "blk.0.x", first_row=100)


def test_finite_values_pass_even_when_their_sum_overflows() -> None:
    check_finite(np.full((4, 8), 3e38, np.float32), "x")
    check_finite(np.zeros((0, 8), np.float32), "x")
    rows = np.array([[np.inf, -np.inf]], np.float32)
    with pytest.raises(TensorError, match=", and 1 more near it"):
        check_finite(rows, "x")
