"""SmoothQuant: outliers of activations moved into the weights, where each row has its own scale.

Xiao et al., arXiv 2211.10438, section 4: channel ``j`` is divided by ``largest(x_j) ** alpha /
largest(w_j) ** (1 - alpha)``. For products that round activations too, with one scale for all that
a step brings (``DynamicQuantizeLinear``: unsigned bytes between the smallest and the largest
value). The paper takes one ``alpha`` for a model; here each coupling has the one whose predicted
error is least.

LLM.int8()'s other way, the largest channels multiplied as floats, goes with this one: see
``llm_int8`` for what each of them and both together are worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.architectures.couplings import Coupling
from edgellm.quant.scaling import Scaling, Weight, sampled_rows, unscaled
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

ALPHAS = np.linspace(0, 1, 21)
"""Strengths that are tried: all of the outliers in the weights at 1."""

ROUNDED = "per_channel"
"""The kind of grid whose products round activations."""

ACTIVATION_STEPS, WEIGHT_STEPS = 255 / 2, 127
"""Steps from zero to the largest value; activations have theirs on both sides, as a rule."""

SMALLEST = 1e-5
"""Parts of the largest that a channel counts for at the least: dead ones keep a finite factor."""

SETTINGS = {"alphas": [round(float(alpha), 2) for alpha in ALPHAS]}


def search(
    weights: Sequence[Weight],
    statistics: Statistics,
    coupling: Coupling,
    *,
    corrected: bool = False,
) -> Scaling:
    """The factors whose predicted error of the output is least; ones where nothing gains.

    Rounding errors are taken as uniform and independent, a twelfth of a step squared: of the
    activations ``sum((step_x * w_rj * s_j)^2)``, with the step that the largest value of the
    calibration asks for, and of the weights ``sum((step_r / s_j)^2 * mean(x_j^2))``, with each
    row's own step.
    """
    rounded = [weight for weight in weights if weight.grid.kind == ROUNDED]
    if not rounded:
        return unscaled(coupling, "its product does not round activations")
    rows = np.concatenate([sampled_rows(weight.ref) for weight in rounded])
    inputs = _at_least(coupling.by_channel(statistics.largest).max(axis=0))
    columns = _at_least(coupling.by_channel(np.abs(rows).max(axis=0)).max(axis=0))
    plain = predicted_error(rows, statistics, np.ones(coupling.columns, np.float32))
    if plain == 0:
        return unscaled(coupling, "its output is always zero in the calibration")
    best = unscaled(coupling)
    for alpha in ALPHAS:
        factors = _normalized(inputs**alpha / columns ** (1 - alpha))
        error = predicted_error(rows, statistics, coupling.spread(factors)) / plain
        if error < best.error:
            best = Scaling(factors, float(alpha), float(error))
    return best


def predicted_error(rows: Array, statistics: Statistics, columns: Array) -> float:
    """The mean square error of the outputs of ``rows`` ``[out, in]`` with factors ``columns``."""
    scaled = np.abs(rows * columns)
    reach = (statistics.largest / columns).max()
    activations = (reach / ACTIVATION_STEPS) ** 2 * np.square(scaled).sum(dtype=np.float64)
    steps = scaled.max(axis=1) / WEIGHT_STEPS
    power = statistics.mean_squares / np.square(columns)
    weights = np.square(steps).sum(dtype=np.float64) * power.sum(dtype=np.float64)
    return float(activations + weights) / 12


def _at_least(sizes: Array) -> Array:
    largest = float(sizes.max())
    floored: Array = np.maximum(sizes, np.float32(SMALLEST * largest))
    return floored if largest > 0 else np.ones_like(sizes)


def _normalized(factors: Array) -> Array:
    """``factors`` around one: their common size changes nothing but how far numbers reach."""
    middle = float(np.exp(np.log(factors).mean(dtype=np.float64)))
    scaled: Array = (factors / middle).astype(np.float32)
    return scaled
