"""Activation-aware scaling: channels that carry much are made large, so that they round finely.

Lin et al., arXiv 2306.00978, section 3.2: a column ``w_j`` times ``s_j`` is rounded with the step
of its group, and its error is divided by ``s_j`` again, while the group's step grows only where the
column comes to hold the group's largest values. The paper takes ``s_j = mean|x_j| ** alpha`` and
looks for one ``alpha``. Here ``s`` is what the trade itself asks for. With ``d_j`` the weight of
the error of column ``j`` and ``m_rg`` the largest ``|w_rj * s_j|`` of row ``r`` in group ``g``, the
error is ``sum_g(sum_r(m_rg ** 2) * sum_j(d_j / s_j ** 2))``; it is least where every channel sets
the group's steps as much as it bears of its error, ``s_j`` is moved there step by step, and the
columns of a group do not depend on others. The paper's clipping is the scale search of the solver
that follows (``imatrix``).

``d`` is the mean square of the channel, or with a solver that makes errors good by later columns
what those leave of it (``factor.Factor.left``). llama.cpp rounds activations too, in blocks, so
that on its grids ``s`` also divides what is large among them: their error is added to that of the
weights (``_Rounded``), and each channel is moved to where both together are least.

SmolLM2 off its grid, the error of the outputs of layers 2, 12, 22 and 29 with factors by without
(the geometric mean over their couplings): int4-g64 plainly rounded 0.66, q4_0 with importance 0.74.
After GPTQ, without ``refine``, in layers 2, 12 and 22: 0.94 on both, and in no coupling above 1.01.
Factors of powers of two, with which folding is exact to the last bit, keep four fifths of the first
gains and a third of GPTQ's. KL to the original (4,096 held-out tokens), int4-g64 plainly rounded:
0.388, with the balanced factors 0.212, with the paper's by the best ``alpha`` 0.207 (each within
0.004), which is why both kinds are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgellm.architectures.couplings import Coupling
from edgellm.quant import imatrix
from edgellm.quant.dequantize import dequantize
from edgellm.quant.factor import factor
from edgellm.quant.grid import Grid
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.quant.scaling import Scaling, Weight, sampled_rows, unscaled
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

STEPS = 30
"""Times that factors are moved; twenty came within a thousandth of a hundred."""

RATE = 0.15
"""Which part of the way, in logarithms, a step goes."""

NORM = np.float32(8)
"""Which norm stands for the largest value of a group, so that values near it count too. Best of 2
to 12, where lower ones lose up to a quarter and higher ones no longer settle."""

STRENGTHS = (1.0, 0.75, 0.5)
"""Powers of the balanced factors that are tried by real rounding. Solvers that weigh columns clip
some that the balance counts with, and then less is better (q4_0: 0.849, 0.810 and 0.813 of the
error without, on made-up inputs whose channels differ by e^1; the paper's best alpha 0.822)."""

FARTHEST = 4.0
"""How far a factor may be from one, as a logarithm: by 55 times."""

TAILS = 0.5
"""See ``_Rounded``. KL of SmolLM2 in llama.cpp by it (0: of weights alone): q4_k_m 0 0.0247, 0.5
0.0232, 0.9 0.0235, 1.5 0.0246, 4 0.0246; q6_k 0 0.0052, 0.5 0.0040, 1.5 0.0041."""

SMALLEST = 1e-6
"""Parts of the largest that a channel's error counts for at the least."""

ALPHAS = (0.2, 0.3, 0.4, 0.5)
"""Powers of ``sqrt(d)``, the paper's factors, that are tried as well: here and there one of them is
better than the balance, which takes the largest values for what they are on average."""

JUDGED_ROWS = 256
"""Rows of a weight by whose real rounding the factors are judged."""

SETTINGS = {
    "strengths": STRENGTHS,
    "alphas": ALPHAS,
    "steps": STEPS,
    "judged_rows": JUDGED_ROWS,
    "tails": TAILS,
}


class Sample(NamedTuple):
    """Rows that stand for a weight; each of them for ``share`` of its rows."""

    rows: Array
    grid: Grid
    share: float


def search(
    weights: Sequence[Weight],
    statistics: Statistics,
    coupling: Coupling,
    *,
    corrected: bool = False,
) -> Scaling:
    """The factors that balance steps and errors, to the power with which sampled rows round best.

    ``Scaling.strength`` is that power; ``Scaling.error`` is measured by rounding the rows:
    ``sum(d_j * (value - w_j) ** 2)`` with the factors by without. Ones where no power gains. Raises
    ``TensorError`` as loading and ``factor`` do.
    """
    samples = [
        Sample(rows, weight.grid, weight.ref.rows / len(rows))
        for weight in weights
        for rows in (sampled_rows(weight.ref),)
    ]
    bearing = factor(statistics.hessian).left if corrected else statistics.importance
    bearing = np.maximum(bearing, np.float32(SMALLEST) * bearing.max())
    if not bearing.max() > 0:
        return unscaled(coupling, "its input is always zero in the calibration")
    rounded = [each for sample in samples if (each := _Rounded.of(sample, statistics.importance))]

    def error_of(columns: Array) -> float:
        error = rounding_error(samples, bearing, columns)
        return error + sum(each.error(columns) for each in rounded)

    plain = error_of(np.ones(coupling.columns, np.float32))
    best = unscaled(coupling)
    if plain == 0:
        return best
    full = balanced(samples, bearing, coupling, rounded)
    sizes = np.sqrt(coupling.by_channel(bearing).mean(axis=0))
    tried = [(full, power) for power in STRENGTHS] + [(sizes, power) for power in ALPHAS]
    for base, strength in tried:
        factors = np.power(base, np.float32(strength))
        error = error_of(coupling.spread(factors)) / plain
        if error < best.error:
            best = Scaling(factors, strength, error)
    return best


def balanced(
    samples: Sequence[Sample],
    bearing: Array,
    coupling: Coupling,
    rounded: Sequence[_Rounded] = (),
) -> Array:
    """Factors ``[channels]`` with which each channel sets steps as much as it bears of the error.

    ``bearing`` float32 ``[columns]`` weighs the error of each column. A channel of ``rounded``
    activations sets their steps where it is made small and bears their error where it is made
    large, the other way round than that of a weight.
    """
    parts = [_Part(sample, bearing) for sample in samples]
    logs = np.zeros(coupling.channels)
    for _ in range(STEPS):
        columns = coupling.spread(np.exp(logs).astype(np.float32))
        sets = np.zeros(coupling.columns, np.float32)
        bears = np.zeros(coupling.columns, np.float32)
        for part in parts:
            part_sets, part_bears = part.shares(columns)
            sets += part_sets
            bears += part_bears
        for each in rounded:
            activation_sets, activation_bears = each.shares(columns)
            sets += activation_bears
            bears += activation_sets
        by_setting = coupling.by_channel(sets).sum(axis=0)
        by_bearing = coupling.by_channel(bears).sum(axis=0)
        tiny = np.float32(1e-9) * by_bearing.max()
        logs += RATE * np.log((by_bearing + tiny) / (by_setting + tiny))
        logs = np.clip(logs - logs.mean(), -FARTHEST, FARTHEST)
    return np.exp(logs).astype(np.float32)


class _Part:
    """One weight's rows, prepared so that a step costs two products of small vectors with them."""

    def __init__(self, sample: Sample, bearing: Array) -> None:
        width = sample.grid.group or sample.rows.shape[1]
        sizes = np.abs(sample.rows).reshape(len(sample.rows), -1, width)
        largest = np.maximum(sizes.max(axis=2), np.float32(1e-30))
        sizes /= largest[:, :, None]
        self.powers = np.power(sizes, NORM, out=sizes)
        # A group's step is its largest value by half as many values as it has; an error that is
        # anywhere within a step is a twelfth of its square.
        steps = np.square(largest) / np.float32(12 * 4.0 ** (sample.grid.bits - 1))
        self.squares = steps * np.float32(sample.share)
        self.bearing = bearing.astype(np.float64).reshape(-1, width)

    def shares(self, columns: Array) -> tuple[Array, Array]:
        """What each column adds to the error by setting steps, and what it bears, ``[columns]``."""
        factors = columns.reshape(self.bearing.shape)
        powers = np.power(factors, NORM)
        totals = np.einsum("rgj,gj->rg", self.powers, powers)
        np.maximum(totals, np.float32(1e-30), out=totals)
        steps = self.squares * np.power(totals, 2 / NORM)
        error = steps.sum(axis=0, dtype=np.float64)[:, None]
        setting = np.einsum("rg,rgj->gj", steps / totals, self.powers) * powers
        bears = self.bearing / np.square(factors, dtype=np.float64)
        sets = setting * bears.sum(axis=1, keepdims=True)
        bears *= error
        return sets.reshape(-1).astype(np.float32), bears.reshape(-1).astype(np.float32)


class _Rounded:
    """The activations of one weight, which llama.cpp rounds to 8 bits in blocks of its codes'.

    ``M ** 2``, the mean square of a block's largest activation, follows the root of its channels'
    ``sum(d ** 2)`` whatever they are divided by: on SmolLM2 0.9 to 1.1 times that behind norms and
    of values, 2.1 to 2.8 times behind a gate (other powers vary more). Here it counts ``TAILS``
    times: the large ones are those of few tokens, each of which has steps of its own. The block's
    step is ``M / 127``, and an error in channel ``j`` counts by the weights that it meets.
    """

    def __init__(self, norms: Array, squares: Array, block: int) -> None:
        self.norms = norms.astype(np.float64).reshape(-1, block)
        self.squares = squares.astype(np.float64).reshape(-1, block)

    @classmethod
    def of(cls, sample: Sample, squares: Array) -> _Rounded | None:
        """Of inputs with these mean ``squares``; None on grids whose activations stay floats."""
        if sample.grid.kind != "ggml":
            return None
        norms = np.einsum("rj,rj->j", sample.rows, sample.rows) * np.float32(sample.share)
        return cls(norms * np.float32(TAILS / (12 * 127**2)), squares, sample.grid.block)

    def shares(self, columns: Array) -> tuple[Array, Array]:
        """As ``_Part.shares``; set where the column's factor is small, borne where it is large."""
        factors = np.square(columns, dtype=np.float64).reshape(self.norms.shape)
        powers = np.square(self.squares / factors)
        totals = np.maximum(powers.sum(axis=1, keepdims=True), 1e-60)
        bears = np.sqrt(totals) * self.norms * factors
        sets = powers / totals * bears.sum(axis=1, keepdims=True)
        return sets.reshape(-1).astype(np.float32), bears.reshape(-1).astype(np.float32)

    def error(self, columns: Array) -> float:
        """What rounding adds to the squared error of the outputs."""
        return float(self.shares(columns)[1].sum(dtype=np.float64))


def rounding_error(samples: Sequence[Sample], bearing: Array, columns: Array) -> float:
    """``sum(bearing * e ** 2)`` for the real error ``e`` of rounding with factors ``columns``.

    By the steps that the factors lead to where a grid's codes do not stand for one value each.
    """
    error = 0.0
    for sample in samples:
        step = -(-len(sample.rows) // JUDGED_ROWS)
        rows = np.ascontiguousarray(sample.rows[::step])
        if sample.grid.name in VECTOR_CODEBOOKS:
            _, bears = _Part(Sample(rows, sample.grid, 1), bearing).shares(columns)
            total = float(bears.sum())
        else:
            weighed = imatrix.fitted(rows * columns, sample.grid, bearing / (columns * columns))
            off = dequantize(weighed) / columns
            off -= rows
            total = float(np.einsum("rj,rj,j->", off, off, bearing))
        error += total * sample.share * len(sample.rows) / len(rows)
    return error
