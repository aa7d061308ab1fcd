"""Rounding to ggml's grids: what ggml itself would spoil without a word."""

import libgguf
import numpy as np
import pytest

from edgellm.errors import TensorError, UnsupportedTarget
from edgellm.quant.ggml import quantize
from edgellm.quant.grid import GRIDS
from edgellm.tensors import Array

NAMES = [name for name, grid in GRIDS.items() if grid.kind == "ggml"]

SLOW_TABLES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")
"""ggml takes up to half a minute to build these grids' tables at first use."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW_TABLES])
def test_values_that_f16_scales_reach_come_back_finite(name: str) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    rows[0, 7], rows[1, 9], rows[2] = 65504.0, -65504.0, np.tile([65504.0, -65504.0], 128)
    packed = quantize(rows, GRIDS[name]).packed
    assert packed is not None
    read_back = libgguf.dequantize_rows(packed, GRIDS[name].ggml_type, 256)
    assert np.isfinite(read_back).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1e6, -1e6])
def test_values_beyond_are_refused_by_size(name: str, value: float) -> None:
    rows = np.zeros((2, 256), np.float32)
    rows[1, 3] = value
    with pytest.raises(TensorError, match=f"1e[+]06 does not fit {name}.*f32"):
        quantize(rows, GRIDS[name])


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs"])
def test_grids_that_ggml_cannot_round_to_without_importance_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedTarget, match=f"{name} is garbage without an importance matrix"):
        quantize(np.zeros((2, 256), np.float32), GRIDS[name])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ones(128, np.float32), r"\[128\] is given for rows of 256"),
        (np.ones((1, 256), np.float32), r"\[1, 256\] is given for rows of 256"),
        (np.where(np.arange(256) == 3, np.nan, 1), "got nan"),
        (np.where(np.arange(256) == 3, np.inf, 1), "got inf"),
        (np.where(np.arange(256) == 3, -2, 1), "got -2"),
    ],
)
def test_importance_that_cannot_be_one_is_refused(wrong: Array, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        quantize(np.zeros((2, 256), np.float32), GRIDS["q4_0"], wrong)
