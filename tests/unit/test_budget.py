"""Budgets: what sizes read as, and choices against every possible one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgellm.budget.choosing import Option, choose, hull
from edgellm.budget.probes import Divergence, LogSum
from edgellm.budget.sizes import bytes_of
from edgellm.errors import UsageError
from edgellm.recipe import make_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90MB", 90_000_000), ("1.5 GiB", 1_610_612_736), ("12kb", 12_000), ("4096", 4096)],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "90 MBit", "-3MB", "0MB", "MB", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        bytes_of(text)


def test_the_hull_leaves_out_what_nobody_should_take() -> None:
    options = [(10, 8.0), (20, 7.9), (30, 1.0), (30, 0.9), (40, 2.0), (50, 0.5)]
    assert hull(options) == [0, 3, 5]


def drawn(seed: int) -> list[list[Option]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(5):
        sizes = np.sort(random.integers(10, 200, 4))
        costs = random.lognormal(0, 2) * 4.0 ** -np.arange(4) * random.uniform(0.5, 1.5, 4)
        found.append([(int(size), float(cost)) for size, cost in zip(sizes, costs, strict=True)])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_choices_fit_and_are_within_a_step_of_the_best(seed: int) -> None:
    options = drawn(seed)
    least = sum(min(each)[0] for each in options)
    most = sum(max(each)[0] for each in options)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(least + share * (most - least))
        chosen = choose(options, budget)
        taken = [each[option] for each, option in zip(options, chosen, strict=True)]
        assert sum(size for size, _ in taken) <= budget
        best = min(
            sum(cost for _, cost in every)
            for every in product(*options)
            if sum(size for size, _ in every) <= budget
        )
        step = max(
            each[a][1] - each[b][1]
            for each in options
            for a, b in zip(hull(each), hull(each)[1:], strict=False)
        )
        assert sum(cost for _, cost in taken) <= best + step
        if share in (0.0, 1.0):
            assert sum(cost for _, cost in taken) <= best * (1 + 1e-12) or share == 0.0


def test_divergence_in_pieces_is_that_of_whole_rows() -> None:
    random = np.random.default_rng(3)
    reference = random.normal(0, 3, (7, 50)).astype(np.float32)
    moved = reference + random.normal(0, 0.01, reference.shape).astype(np.float32)
    total = LogSum(7)
    pieces = [slice(0, 20), slice(20, 23), slice(23, 50)]
    for piece in pieces:
        total.add(reference[:, piece])
    found = Divergence(7)
    for piece in pieces:
        part = reference[:, piece]
        shares = np.exp(part.astype(np.float64) - total.value()[:, np.newaxis])
        found.add(shares, part, moved[:, piece])
    logs = [
        wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        for wide in (reference.astype(np.float64), moved.astype(np.float64))
    ]
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean()
    assert found.mean(total) == pytest.approx(expected, rel=1e-9)


def test_bits_are_positive() -> None:
    with pytest.raises(UsageError, match="bits must be above 0"):
        make_recipe({"source": "x", "bits": 0})
