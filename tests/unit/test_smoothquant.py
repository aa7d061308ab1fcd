"""SmoothQuant against products that round activations as onnxruntime's DynamicQuantizeMatMul."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.architectures.couplings import Coupling
from edgellm.calibration.transforms import check_useful
from edgellm.errors import UsageError
from edgellm.quant import rtn, smoothquant
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS
from edgellm.quant.scaling import Weight
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array, constant

GRID = GRIDS["int8-dynamic"]
ROLE = "blk.0.ffn_down.weight"


def inputs(columns: int = 192, outliers: int = 4, size: float = 100) -> Array:
    """Inputs ``[tokens, columns]`` of which a few channels are far larger, as in real models."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((300, columns)) * np.exp(0.5 * draw.standard_normal(columns))
    x[:, :outliers] *= size
    return x.astype(np.float32)


def weights(columns: int = 192) -> Array:
    return np.random.default_rng(1).standard_normal((128, columns)).astype(np.float32)


def statistics_of(x: Array) -> Statistics:
    return Statistics((x.T @ x / len(x)).astype(np.float32), np.abs(x).max(axis=0), len(x))


def as_bytes(x: Array) -> Array:
    """``DynamicQuantizeLinear`` and back, by ONNX's definition of it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    return ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)


def output_error(x: Array, rows: Array, factors: Array) -> float:
    """The mean square error of the product in 8 bits, relative to the output's mean square."""
    exact = x @ rows.T
    rounded = dequantize(rtn.solve(rows * factors, GRID))
    off = as_bytes(x / factors) @ rounded.T - exact
    return float(np.square(off).mean() / np.square(exact).mean())


def search(x: Array, rows: Array) -> tuple[Array, float]:
    coupling = Coupling(0, "ffn_up", (ROLE,), (), x.shape[1])
    found = smoothquant.search([Weight(constant(ROLE, rows), GRID)], statistics_of(x), coupling)
    return found.factors, found.error


def of_paper(x: Array, rows: Array, alpha: float) -> Array:
    """Section 4.2's factors."""
    factors: Array = np.abs(x).max(axis=0) ** alpha / np.abs(rows).max(axis=0) ** (1 - alpha)
    return factors


@pytest.mark.parametrize("size", [3, 10, 30, 100])
def test_outliers_no_longer_spoil_the_other_channels(size: float) -> None:
    """Outliers carry no more of the output than the rest, whose rounding they coarsen.

    With 100 plain rounding loses the rest, and its error no longer grows as predicted.
    """
    x, rows = inputs(size=size), weights()
    rows[:, :4] /= size
    factors, predicted = search(x, rows)
    plain = output_error(x, rows, np.ones(192, np.float32))
    ours = output_error(x, rows, factors)
    assert ours < {3: 0.36, 10: 0.05, 30: 0.006, 100: 6e-4}[size] * plain
    assert ours / plain == pytest.approx(predicted, rel=0.4)


def test_the_strength_found_is_no_worse_than_any_for_a_whole_model() -> None:
    for size in (3, 30, 300):
        x, rows = inputs(size=size), weights()
        factors, _ = search(x, rows)
        others = [output_error(x, rows, of_paper(x, rows, a)) for a in (0, 0.25, 0.5, 0.75, 1)]
        assert output_error(x, rows, factors) < 1.1 * min(others)


def test_equal_channels_and_dead_ones_keep_factors_finite() -> None:
    x, rows = inputs(outliers=0), weights()
    x[:, 5] = 0
    rows[:, 7] = 0
    factors, error = search(x, rows)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert error < 1
    factors, error = search(np.zeros_like(x), rows)
    np.testing.assert_array_equal(factors, 1)


def test_grids_whose_products_keep_activations_have_nothing_to_gain() -> None:
    coupling = Coupling(0, "ffn_up", (ROLE,), (), 192)
    weight = Weight(constant(ROLE, weights()), GRIDS["int8"])
    found = smoothquant.search([weight], statistics_of(inputs()), coupling)
    np.testing.assert_array_equal(found.factors, 1)
    assert "does not round activations" in found.reason
    with pytest.raises(UsageError, match=r"int4-g64 does not round: .*awq:int4-g64"):
        check_useful("smoothquant", [GRIDS["int4-g64"]])
    with pytest.raises(UsageError, match="awq prepares weights for rounding"):
        check_useful("awq", [GRIDS["f16"], GRIDS["f32"]])
    check_useful("smoothquant", [GRIDS["int8-dynamic"], GRIDS["f16"]])
