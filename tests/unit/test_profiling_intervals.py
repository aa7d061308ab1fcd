"""Medians with intervals, percentiles, and ratios with a verdict."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from edgellm.errors import UsageError
from edgellm.profiling.intervals import distribution, figure, ratio, unpaired

NAMES = ("new", "old")


@pytest.mark.parametrize(
    ("median", "draw"),
    [
        (0.0, lambda random: random.standard_normal(20)),
        (np.log(2), lambda random: random.exponential(1.0, 20)),
        # A round is disturbed now and then, and much.
        (10.0, lambda random: 10 + random.standard_normal(20) * random.choice([0.1, 5], 20)),
    ],
    ids=["normal", "exponential", "disturbed"],
)
def test_interval_holds_the_true_median_as_often_as_it_says(median: float, draw: object) -> None:
    assert callable(draw)
    random = np.random.default_rng(5)
    found = [figure(draw(random)) for _ in range(400)]
    share = sum(one.low <= median <= one.high for one in found) / len(found)
    assert 0.90 <= share <= 0.99
    # Not by being wide: half of the samples' range would do for a normal distribution.
    assert np.median([one.high - one.low for one in found]) < np.median(
        [np.ptp(one.samples) for one in found]
    )


@pytest.mark.parametrize(
    ("samples", "median", "low", "high"),
    [
        ([3.0], 3, 3, 3),
        ([4.0, 2.0], 3, 2, 4),
        ([5.0, 1.0, 2.0], 2, 1, 5),
        # Of five, 5.8 % of all resamples have the least as their median: more than 2.5 %.
        ([5.0, 1.0, 2.0, 4.0, 3.0], 3, 1, 5),
        # Of seven, 1.0 % have the least and 12.6 % the least or the second.
        ([7.0, 1.0, 2.0, 4.0, 3.0, 6.0, 5.0], 4, 2, 6),
        # Of thirteen, 1.6 % have one of the three least and 7 % one of the four.
        ([float(value) for value in range(1, 14)], 7, 4, 10),
        ([2.0] * 9, 2, 2, 2),
    ],
)
def test_intervals_worked_by_hand(
    samples: list[float], median: float, low: float, high: float
) -> None:
    found = figure(samples)
    assert (found.median, found.low, found.high) == (median, low, high)
    assert found.samples == tuple(samples)  # in the order of the rounds
    assert figure(samples) == found


def test_percentiles_are_those_of_numpy() -> None:
    samples = np.random.default_rng(3).exponential(0.01, 301).tolist()
    found = distribution(samples)
    assert found.samples == tuple(samples)
    assert found.mean == pytest.approx(sum(samples) / 301)
    assert found.max == max(samples)
    for value, percent in ((found.p50, 50), (found.p90, 90), (found.p95, 95), (found.p99, 99)):
        assert value == np.percentile(samples, percent)
    assert distribution([1.0, 2.0]).p90 == pytest.approx(1.9)  # between the two


@pytest.mark.parametrize(
    ("of", "better", "noisy", "verdict"),
    [
        ([20.0, 22.0, 21.0, 20.5, 21.5], "higher", False, "faster"),
        ([20.0, 22.0, 21.0, 20.5, 21.5], "lower", False, "slower"),
        ([5.0, 5.2, 5.1, 4.9, 5.0], "higher", False, "slower"),
        ([5.0, 5.2, 5.1, 4.9, 5.0], "lower", False, "faster"),
        ([20.0, 22.0, 21.0, 20.5, 21.5], "higher", True, "noisy, not judged"),
        ([9.0, 11.0, 10.0, 10.5, 9.5], "higher", False, "no difference shown"),
        # One or two rounds show nothing; three do where they agree better than they differ from 1.
        ([20.0], "higher", False, "no difference shown"),
        ([20.0, 20.1], "higher", False, "no difference shown"),
        ([20.0, 20.1, 19.9], "higher", False, "faster"),
        ([11.0, 15.0, 12.0], "higher", False, "no difference shown"),
    ],
)
def test_verdicts(
    of: list[float], better: Literal["higher", "lower"], noisy: bool, verdict: str
) -> None:
    to = [10.0] * len(of)
    found = ratio(of, to, "decode_tokens_per_s", better=better, noisy=noisy, names=NAMES)
    assert found.verdict == verdict
    assert (found.of, found.to, found.quantity) == (*NAMES, "decode_tokens_per_s")


def test_rounds_are_compared_with_themselves() -> None:
    """A drift that both cells share hides no difference."""
    drift = np.array([1.0, 1.5, 2.0, 0.7, 1.2, 3.0])
    found = ratio(
        (11 * drift).tolist(), (10 * drift).tolist(), "s", better="lower", noisy=False, names=NAMES
    )
    assert found.verdict == "slower"
    assert found.ratio.samples == pytest.approx([1.1] * 6)
    # A cell that was cut short has the first rounds in common with the other.
    short = ratio(
        [11.0, 16.5], (10 * drift).tolist(), "s", better="lower", noisy=False, names=NAMES
    )
    assert short.ratio.samples == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize("rounds", [3, 4, 5, 10])
def test_equal_cells_are_seldom_told_apart(rounds: int) -> None:
    random = np.random.default_rng(7)
    found = 0
    for _ in range(400):
        of, to = np.exp(0.05 * random.standard_normal((2, rounds)))
        one = ratio(of.tolist(), to.tolist(), "s", better="lower", noisy=False, names=NAMES)
        found += one.verdict != "no difference shown"
    assert found / 400 < 0.1


@pytest.mark.parametrize(
    ("of", "to", "verdict"),
    [
        ([8.0, 8.1, 7.9, 8.0, 8.2], [10.0, 10.1, 9.9, 10.2, 9.8, 10.0], "slower"),
        ([12.0, 12.1, 11.9, 12.0, 12.2], [10.0, 10.1, 9.9, 10.2, 9.8], "faster"),
        ([9.9, 10.1, 10.0, 10.2, 9.8], [10.0, 10.1, 9.9, 10.2, 9.8], "no difference shown"),
        ([12.0], [10.0, 10.1, 9.9, 10.2, 9.8], "no difference shown"),
        ([20.0, 20.1, 20.2], [10.0, 10.1, 9.9], "faster"),
        ([11.0, 13.0, 12.0], [10.0, 10.1, 9.9], "no difference shown"),
    ],
)
def test_verdicts_without_pairs(of: list[float], to: list[float], verdict: str) -> None:
    found, said = unpaired(of, to, better="higher", noisy=False)
    assert said == verdict
    assert found.median == pytest.approx(np.median(of) / np.median(to))
    assert found.low <= found.median <= found.high
    assert unpaired(of, to, better="higher", noisy=True)[1] == "noisy, not judged"
    if verdict == "faster":
        assert unpaired(of, to, better="lower", noisy=False)[1] == "slower"


def test_interval_without_pairs_holds_the_true_ratio() -> None:
    random = np.random.default_rng(11)
    held = told_apart = 0
    for _ in range(400):
        of, to = np.exp(0.05 * random.standard_normal((2, 12)))
        found, _ = unpaired((1.2 * of).tolist(), to.tolist(), better="lower", noisy=False)
        held += found.low <= 1.2 <= found.high
        told_apart += unpaired(of[:5], to[:5], better="lower", noisy=False)[1] == "slower"
    assert 0.90 <= held / 400 <= 0.99
    assert told_apart / 400 < 0.05


def test_without_samples_there_is_no_figure() -> None:
    with pytest.raises(UsageError, match="at least one round"):
        figure([])
    with pytest.raises(UsageError, match="divided"):
        unpaired([1.0], [0.0], better="lower", noisy=False)
    with pytest.raises(UsageError, match="old has a round whose energy is 0"):
        ratio([1.0, 2.0], [1.0, 0.0], "energy", better="lower", noisy=False, names=NAMES)
