"""Changes that are not accepted: what stops a build when two profiles are compared."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.errors import UsageError
from edgellm.profiling.intervals import NOISY, NOT_SHOWN

if TYPE_CHECKING:
    from edgellm.profiling.comparing import Pair

WRITTEN = re.compile(r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A change in percent that is not accepted, as ``decode_tokens_per_s < -5%``."""

    text: str
    quantity: str
    holds: Callable[[float, float], bool]
    percent: float

    @classmethod
    def parsed(cls, text: str, quantities: Collection[str]) -> Condition:
        """Raises ``UsageError`` for what is no condition of one of the ``quantities``."""
        found = WRITTEN.fullmatch(text)
        if not found or found[1] not in quantities:
            raise UsageError(
                f"--fail-if {text!r} is not understood: give QUANTITY < PERCENT% or > PERCENT%, as "
                f"'decode_tokens_per_s < -5%'; quantities are {', '.join(quantities)}"
            )
        compare = operator.lt if found[2] == "<" else operator.gt
        return cls(text, found[1], compare, float(found[3]))


def judged(
    pairs: Sequence[Pair], conditions: Sequence[Condition]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which conditions came true for certain, and which only seem to have; sentences of each.

    Raises ``UsageError`` for a condition of what no pair has: it would hold whatever happens.
    """
    failed: list[str] = []
    doubtful: list[str] = []
    for condition in conditions:
        meant = [pair for pair in pairs if pair.quantity == condition.quantity]
        if not meant:
            raise UsageError(
                f"--fail-if {condition.text!r} can never come true: no two cells that are compared "
                f"have {condition.quantity}; leave it out, or measure it"
            )
        for pair in meant:
            change = 100 * (pair.ratio.median - 1)
            if not condition.holds(change, condition.percent):
                continue
            text = f"{condition.text}: {pair.of} differs by {change:+.1f} % from {pair.to}"
            (doubtful if pair.verdict in (NOISY, NOT_SHOWN) else failed).append(text)
    return tuple(failed), tuple(doubtful)
