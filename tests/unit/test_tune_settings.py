"""What tuning is told and what it would take; no torch is needed to know."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edgellm.errors import UsageError
from edgellm.recipe import Recipe, make_recipe
from edgellm.tune.settings import MOST_HELD_OUT, rate_share, split


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 31, 64, 1000])
def test_a_part_of_the_text_is_held_out_and_the_rest_is_trained_on(count: int) -> None:
    windows = list(range(count))
    training, held_out = split(windows)
    assert sorted([*training, *held_out]) == windows
    assert training
    assert 1 <= len(held_out) <= MOST_HELD_OUT
    assert len(held_out) <= max(1, count // 8)
    if len(held_out) > 1:  # one of each stretch of the text
        gaps = {after - before for before, after in pairwise(held_out)}
        assert len(gaps) == 1


def test_one_window_cannot_be_parted() -> None:
    with pytest.raises(UsageError, match=r"at least 2 windows.*--calibration-tokens"):
        split([[1, 2, 3]])


def test_the_rate_rises_and_falls_to_zero() -> None:
    shares = [rate_share(step, 100, 5) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(shares) == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 <= shares[-1] < 0.001
    assert rate_share(0, 1, 5) == 1.0


def test_steps_change_the_recipe_and_are_at_least_one() -> None:
    plain, tuned = (make_recipe({"source": "m", "quant": "rtn:q4_0", "tune": n}) for n in (None, 9))
    assert plain.sha256() != tuned.sha256()
    assert "tune" not in plain.choices()
    assert tuned.choices()["tune"] == 9
    with pytest.raises(UsageError, match="tune is a number of steps, at least 1, got 0"):
        make_recipe({"source": "m", "tune": 0})


def test_rounding_that_is_tuned_heeds_a_calibration_text() -> None:
    options = {"source": "m", "quant": "rtn:q4_0", "calibration": "text.txt", "seed": 3}
    assert isinstance(make_recipe({**options, "tune": 9}), Recipe)
    with pytest.raises(UsageError, match="calibration is for solvers"):
        make_recipe(options)
