"""The choice of one option for each tensor whose costs sum to the least within a budget of bytes.

The multiple-choice knapsack by its linear relaxation: of each tensor only the options on the lower
convex hull of cost against bytes can be best, and steps along the hulls are taken in the order of
what a byte gains (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research
27, 1979, section 2). What is left of the budget goes to single exchanges that still fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Option = tuple[int, float]
"""Bytes, and what they are expected to cost in answers."""


@dataclass(frozen=True, slots=True)
class Step:
    """From one option of a tensor to the next larger one on its hull."""

    gain_a_byte: float
    place: int
    option: int
    nbytes: int


def choose(options: Sequence[Sequence[Option]], budget_bytes: int) -> list[int]:
    """Which of each tensor's ``options`` to take: the smallest ones where no others fit.

    The sum of costs is above the optimum by less than what one step of one tensor gains.
    """
    hulls = [hull(each) for each in options]
    chosen = [each[0] for each in hulls]
    left = budget_bytes - sum(options[place][option][0] for place, option in enumerate(chosen))
    for step in sorted(_steps(options, hulls), key=lambda step: -step.gain_a_byte):
        before = options[step.place][chosen[step.place]][0]
        added = step.nbytes - before
        if added <= left:
            chosen[step.place] = step.option
            left -= added
    while True:
        swap = _best_exchange(options, chosen, left)
        if swap is None:
            return chosen
        place, option = swap
        left -= options[place][option][0] - options[place][chosen[place]][0]
        chosen[place] = option


def hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, smallest first: none larger costs as much or more."""
    order = sorted(range(len(options)), key=lambda option: options[option])
    kept: list[int] = []
    for option in order:
        if kept and options[option][1] >= options[kept[-1]][1]:
            continue
        while len(kept) > 1 and _gain(options, kept[-2], kept[-1]) <= _gain(
            options, kept[-2], option
        ):
            kept.pop()
        kept.append(option)
    return kept


def _gain(options: Sequence[Option], smaller: int, larger: int) -> float:
    """What a byte more gains between two options; of equal size everything."""
    added = options[larger][0] - options[smaller][0]
    saved = options[smaller][1] - options[larger][1]
    return saved / added if added else float("inf")


def _steps(options: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[Step]:
    return [
        Step(_gain(options[place], smaller, larger), place, larger, options[place][larger][0])
        for place, each in enumerate(hulls)
        for smaller, larger in pairwise(each)
    ]


def _best_exchange(
    options: Sequence[Sequence[Option]], chosen: Sequence[int], left: int
) -> tuple[int, int] | None:
    """The tensor and its option that save most among those that fit in ``left`` bytes more."""
    best, found = 0.0, None
    for place, each in enumerate(options):
        nbytes, cost = each[chosen[place]]
        for option, (other_bytes, other_cost) in enumerate(each):
            saved = cost - other_cost
            if saved > best and other_bytes - nbytes <= left:
                best, found = saved, (place, option)
    return found
