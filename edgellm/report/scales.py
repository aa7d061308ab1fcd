"""From figures to pixels, and the round numbers that stand at an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LOGARITHMIC_FROM = 8.0
"""Lengths that differ by this factor stand on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Figures from ``low`` to ``high`` on pixels from ``start`` to ``end``; may be logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The pixel of ``value``; what lies outside is put on the nearer end."""
        low, high = self._along(self.low), self._along(self.high)
        inside = min(max(value, self.low), self.high)
        share = (self._along(inside) - low) / (high - low) if high > low else 0.0
        return self.start + (self.end - self.start) * share

    def _along(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high`` with one step between them, at most ``most``."""
    if not high > low:
        return [low]
    decade = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (decade * each for each in STEPS):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return [low, high]


def round_top(high: float, most: int = 6) -> float:
    """The round number at or above ``high`` where an axis from 0 ends."""
    if not high > 0:
        return 1.0
    ticks = round_ticks(0, high, most)
    step = ticks[1] - ticks[0]
    return ticks[-1] if ticks[-1] >= high else float(f"{ticks[-1] + step:.12g}")


def decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below ``low`` to the first above."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{part}e{power}") for power in powers for part in (1, 2, 5)]
    below = max((each for each in values if each <= low * (1 + 1e-9)), default=values[0])
    above = min((each for each in values if each >= high * (1 - 1e-9)), default=values[-1])
    return [each for each in values if below <= each <= above]


def spread(ticks: Sequence[float], scale: Scale, room: float) -> list[float]:
    """Those of ``ticks`` that stand at least ``room`` pixels apart; the last one always stays."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or abs(scale.at(kept[-1]) - scale.at(tick)) >= room:
            kept.append(tick)
    return kept[::-1]


def tick_text(value: float) -> str:
    """``0``, ``2.5``, ``1,000``."""
    return (
        f"{value:,.6f}".rstrip("0").rstrip(".") if abs(value) >= 1e-4 or not value else f"{value:g}"
    )
