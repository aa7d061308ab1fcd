"""Samples to figures: medians with intervals, percentiles, and ratios with a verdict.

Samples of rounds are few and skewed (a round is disturbed upwards, never downwards), so the middle
is the median and its interval comes from the samples themselves: the percentile bootstrap (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.errors import UsageError
from edgellm.profiling.document import Distribution, Figure, Ratio

Better = Literal["higher", "lower"]
"""Which way a quantity is faster: more tokens per second, fewer seconds."""

Values = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Efron and Tibshirani (section 14.3) find 1,000 to 2,000 enough for the ends of 95 %."""

SEED = 0
"""The same samples must give the same interval whenever a report is made of them."""

FEWEST = 4
"""Below so many samples a resample says nothing that the least and the largest do not."""

FEWEST_FOR_VERDICT = 3

FEWEST_BY_INTERVAL = 5
"""The range of five samples holds the median in 15 of 16 cases, that of four in 7 of 8."""

FASTER, SLOWER, NOT_SHOWN, NOISY = "faster", "slower", "no difference shown", "noisy, not judged"


def figure(samples: Sequence[float]) -> Figure:
    """The median of ``samples`` and its 95 % interval: least and largest for fewer than four.

    Raises ``UsageError`` where there is no sample.
    """
    values = _values(samples)
    if len(values) < FEWEST:
        low, high = float(values.min()), float(values.max())
    else:
        low, high = _ends(_medians(values, np.random.default_rng(SEED)))
    return Figure(
        samples=tuple(values.tolist()), median=float(np.median(values)), low=low, high=high
    )


def distribution(samples: Sequence[float]) -> Distribution:
    """How ``samples`` spread; percentiles lie between two samples in proportion (linear).

    Raises ``UsageError`` where there is no sample.
    """
    values = _values(samples)
    p50, p90, p95, p99 = (float(found) for found in np.percentile(values, [50, 90, 95, 99]))
    return Distribution(
        samples=tuple(values.tolist()),
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(values.max()),
    )


def ratio(
    of: Sequence[float],
    to: Sequence[float],
    quantity: str,
    *,
    better: Better,
    noisy: bool,
    names: tuple[str, str],
) -> Ratio:
    """``of`` divided by ``to``, samples of the same round by each other, and what that shows.

    Where one cell has fewer rounds than the other, the rounds that both have count. ``better``:
    whether more of ``quantity`` is faster (tokens per second) or less of it (seconds). ``noisy``:
    whether the rounds of either were disturbed. ``names`` are those of the two cells.

    No difference is shown where the interval holds 1, and none by fewer than three rounds. The
    interval of three or four is hardly more than a range, which misses the median too often, so it
    must also be narrower than its distance to 1: about what Student's t at 95 % asks of three.

    Raises ``UsageError`` without a common round, or where ``to`` has a zero.
    """
    rounds = min(len(of), len(to))
    over, under = _values(of[:rounds]), _values(to[:rounds])
    if not under.all():
        raise UsageError(
            f"{names[1]} has a round whose {quantity} is 0, and nothing can be divided by it: "
            "measure more tokens"
        )
    found = figure((over / under).tolist())
    return Ratio(
        quantity=quantity,
        of=names[0],
        to=names[1],
        ratio=found,
        verdict=NOISY if noisy else _verdict(found, better, rounds),
    )


def unpaired(
    of: Sequence[float],
    to: Sequence[float],
    *,
    better: Better,
    noisy: bool,
) -> tuple[Figure, str]:
    """The median of ``of`` divided by that of ``to``, of rounds that have no pairs, and a verdict.

    The interval is of both medians, resampled apart; where either side has fewer than four samples,
    from the least to the largest quotient. ``samples`` are those of ``of`` by the median of ``to``.
    The verdict is as for ``ratio``, by the side that has fewer samples. Raises what that does.
    """
    over, under = _values(of), _values(to)
    if not under.all():
        raise UsageError("a sample is 0, and nothing can be divided by it: measure more tokens")
    fewest = min(len(over), len(under))
    if fewest < FEWEST:
        ends = over.min() / under.max(), over.max() / under.min()
    else:
        random = np.random.default_rng(SEED)
        ends = _ends(_medians(over, random) / _medians(under, random))
    quotients = over / np.median(under)
    found = Figure(
        samples=tuple(quotients.tolist()),
        median=float(np.median(quotients)),
        low=float(ends[0]),
        high=float(ends[1]),
    )
    return found, NOISY if noisy else _verdict(found, better, fewest)


def _verdict(found: Figure, better: Better, rounds: int) -> str:
    nearest = max(found.low - 1, 1 - found.high)  # below 0 where the interval holds 1
    if rounds < FEWEST_FOR_VERDICT or nearest <= 0:
        return NOT_SHOWN
    if rounds < FEWEST_BY_INTERVAL and found.high - found.low > nearest:
        return NOT_SHOWN
    return FASTER if (found.low > 1) == (better == "higher") else SLOWER


def _medians(values: Values, random: np.random.Generator) -> Values:
    """The median of each resample of ``values``."""
    drawn = random.integers(0, len(values), (RESAMPLES, len(values)))
    medians: Values = np.median(values[drawn], axis=1)
    return medians


def _ends(medians: Values) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def _values(samples: Sequence[float]) -> Values:
    values = np.asarray(samples, np.float64)
    if not len(values):
        raise UsageError("there is no sample to take a figure of: measure at least one round")
    return values
