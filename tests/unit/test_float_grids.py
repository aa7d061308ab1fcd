"""Float grids: rounding, and values that do not fit. Names of grids."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.errors import TensorError, UnknownGrid, UnsupportedTarget
from edgellm.quant.floats import encode
from edgellm.quant.grid import GRIDS, grid_named


def test_ties_go_to_even_and_bytes_are_little_endian() -> None:
    rows = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8]], dtype=np.float32)
    packed = encode(rows, GRIDS["bf16"]).packed
    assert packed is not None
    assert packed.tolist() == [[0x80, 0x3F, 0x82, 0x3F]]
    packed = encode(np.array([[1 + 2.0**-11]], dtype=np.float32), GRIDS["f16"]).packed
    assert packed is not None
    assert packed.tolist() == [[0x00, 0x3C]]


@pytest.mark.parametrize(
    ("grid", "value", "instead"),
    [("f16", 65520.0, "bf16 or f32"), ("f16", -1e9, "bf16"), ("bf16", 3.4e38, "choose f32")],
)
def test_a_value_that_would_become_infinite_is_an_error(
    grid: str, value: float, instead: str
) -> None:
    rows = np.array([[0.0, value]], dtype=np.float32)
    with pytest.raises(TensorError, match=f"does not fit {grid}.*{instead}"):
        encode(rows, GRIDS[grid])


def test_the_largest_values_fit() -> None:
    encode(np.array([[65504.0, 65519.0]], dtype=np.float32), GRIDS["f16"])
    encode(np.array([[3.38e38]], dtype=np.float32), GRIDS["bf16"])


def test_packed_does_not_depend_on_the_rows_layout() -> None:
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    turned = np.asfortranarray(square)
    for name in ("f32", "f16", "bf16"):
        ours, other = encode(square, GRIDS[name]).packed, encode(turned, GRIDS[name]).packed
        assert ours is not None
        assert ours.shape == (2, 3 * int(GRIDS[name].bits) // 8)
        assert np.array_equal(ours, other)


def test_other_grids_are_refused() -> None:
    with pytest.raises(UnsupportedTarget, match="q4_0 is not a float grid"):
        encode(np.zeros((1, 32), np.float32), GRIDS["q4_0"])


def test_grids_are_found_by_name_in_any_case() -> None:
    assert grid_named("Q4_K") is GRIDS["q4_k"]
    with pytest.raises(UnknownGrid, match=r"did you mean .*int4-g64"):
        grid_named("int4-64")
    with pytest.raises(UnknownGrid, match="choose f32, f16"):
        grid_named("?")
