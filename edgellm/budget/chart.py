"""KL against size laid out as lines, symbols and words in pixels; ``picture.py`` writes it out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.budget.labels import LINE_HEIGHT, Box, place_labels, width_of

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 30, 34, 64
"""Room around the plot in pixels: for the axes' numbers and names, and for the title."""

LEGEND_HEIGHT = 22
SYMBOL_RADIUS = 5.0
PAD = 0.08
"""Part of the sizes' range that is left free on either side of them."""

LEAST_RANGE = 0.1
"""Sizes closer to each other than this part of the largest are shown as if so far apart."""

FEW_DECADES = 2.5
"""Where KL spans no more powers of ten, 2 and 5 times each have a line too."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One point: its size, its KL in nats a token and the standard error of that.

    Points of one ``series`` look alike. Those of one ``label`` are joined, and it is written once.
    """

    label: str
    nbytes: int
    kl: float
    kl_error: float
    series: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """``kind``: ``axis``, ``grid``, ``join`` (of points or to their label), or ``error``."""

    kind: str
    x1: float
    y1: float
    x2: float
    y2: float
    series: int = 0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A point of the ``series``-th series, centred."""

    x: float
    y: float
    series: int


@dataclass(frozen=True, slots=True)
class Words:
    """Text whose baseline is at ``y``; ``anchor`` as in SVG. ``turned``: read from below."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """Lines first, then symbols, then words, in pixels from the upper left corner."""

    title: str
    lines: tuple[Line, ...]
    symbols: tuple[Symbol, ...]
    words: tuple[Words, ...]


def can_be_drawn(marks: Sequence[Mark]) -> bool:
    """Whether any point has a place on a logarithmic axis: a KL above 0."""
    return any(mark.kl > 0 for mark in marks)


def chart(marks: Sequence[Mark], title: str) -> Drawing:
    """The drawing; KL on a logarithmic axis. A point that has no place there is named below it.

    Raises ``ValueError`` where no point has one.
    """
    if not can_be_drawn(marks):
        raise ValueError("no point has a KL above 0")
    shown = [mark for mark in marks if mark.kl > 0]
    series = list(dict.fromkeys(mark.series for mark in shown))
    plot = _Plot(shown, TOP + (LEGEND_HEIGHT if len(series) > 1 else 0))
    symbols = [
        Symbol(plot.across(mark.nbytes / 1e6), plot.down(mark.kl), series.index(mark.series))
        for mark in shown
    ]
    errors = [
        Line(
            "error",
            symbol.x,
            plot.down(mark.kl + mark.kl_error),
            symbol.x,
            plot.down(mark.kl - mark.kl_error),
            symbol.series,
        )
        for mark, symbol in zip(shown, symbols, strict=True)
    ]
    joins, at = _joined(shown, symbols)
    labels = place_labels(
        [(label, symbol.x, symbol.y) for label, symbol in at.items()],
        [
            *(_box_of(symbol) for symbol in symbols),
            *(box for line in errors + joins for box in _boxes_along(line)),
        ],
        Box(LEFT + 2, plot.top + 2, WIDTH - 4, plot.bottom - 2),
    )
    leaders = [Line("join", *label.leader) for label in labels if label.leader]
    words = [Words(label.x, label.y, label.text, label.anchor) for label in labels]
    words += _legend(series) if len(series) > 1 else []
    left_out = [mark.label for mark in marks if mark.kl <= 0]
    if left_out:
        words.append(
            Words(WIDTH - RIGHT, HEIGHT - 8, f"not shown, KL 0: {', '.join(left_out)}", "end")
        )
    return Drawing(
        title=title,
        lines=(*plot.lines(), *leaders, *joins, *errors),
        symbols=(*symbols, *_legend_symbols(series)),
        words=(Words(LEFT, 20, title), *plot.words(), *words),
    )


class _Plot:
    """The axes: which sizes and KLs they show, and where."""

    def __init__(self, marks: Sequence[Mark], top: float) -> None:
        self.top, self.bottom = top, HEIGHT - BOTTOM
        sizes = [mark.nbytes / 1e6 for mark in marks]
        span = max(max(sizes) - min(sizes), LEAST_RANGE * max(sizes))
        middle = (max(sizes) + min(sizes)) / 2
        self.smallest = max(0.0, middle - span * (0.5 + PAD))
        self.largest = middle + span * (0.5 + PAD)
        least = min(mark.kl for mark in marks)
        most = max(mark.kl + mark.kl_error for mark in marks)
        ladder = _round_values(least, most, (1, 2, 5))
        if math.log10(ladder[-1] / ladder[0]) > FEW_DECADES:
            ladder = _round_values(least, most, (1,))
        self.ladder = ladder

    def across(self, megabytes: float) -> float:
        share = (megabytes - self.smallest) / (self.largest - self.smallest)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def down(self, kl: float) -> float:
        low, high = math.log10(self.ladder[0]), math.log10(self.ladder[-1])
        share = (math.log10(max(kl, self.ladder[0])) - low) / (high - low)
        return self.bottom - (self.bottom - self.top) * share

    def lines(self) -> list[Line]:
        right = WIDTH - RIGHT
        grid = [Line("grid", LEFT, self.down(kl), right, self.down(kl)) for kl in self.ladder]
        for megabytes in self._ticks():
            x = self.across(megabytes)
            grid.append(Line("grid", x, self.top, x, self.bottom))
        return [
            *grid,
            Line("axis", LEFT, self.bottom, right, self.bottom),
            Line("axis", LEFT, self.top, LEFT, self.bottom),
        ]

    def words(self) -> list[Words]:
        numbers = [Words(LEFT - 8, self.down(kl) + 4, f"{kl:g}", "end") for kl in self.ladder]
        for megabytes in self._ticks():
            x = self.across(megabytes)
            numbers.append(Words(x, self.bottom + 18, f"{megabytes:g}", "middle"))
        across = (LEFT + WIDTH - RIGHT) / 2
        middle = (self.top + self.bottom) / 2
        return [
            *numbers,
            Words(across, self.bottom + 38, "size of all files, MB", "middle"),
            Words(20, middle, "KL to the source, nats a token", "middle", turned=True),
        ]

    def _ticks(self) -> list[float]:
        """Round sizes between the ends, four to nine of them."""
        span = self.largest - self.smallest
        step = 10.0 ** math.floor(math.log10(span))
        step *= next(part for part in (1, 0.5, 0.2, 0.1) if span / (step * part) >= 4)
        first, last = math.ceil(self.smallest / step), math.floor(self.largest / step)
        return [float(f"{count * step:.12g}") for count in range(first, last + 1)]


def _round_values(least: float, most: float, parts: Sequence[int]) -> list[float]:
    """Powers of ten times ``parts``, the fewest that enclose both, two at least."""
    powers = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
    values = [float(f"{part}e{power}") for power in powers for part in parts]
    first = max(place for place, value in enumerate(values) if value <= least)
    last = min(place for place, value in enumerate(values) if value >= most)
    return values[first : max(last, first + 1) + 1]


def _joined(
    marks: Sequence[Mark], symbols: Sequence[Symbol]
) -> tuple[list[Line], dict[str, Symbol]]:
    """Lines from point to point of one label, and the point, the highest, that has it beside it."""
    found: dict[str, list[Symbol]] = {}
    for mark, symbol in zip(marks, symbols, strict=True):
        found.setdefault(mark.label, []).append(symbol)
    lines = []
    for group in found.values():
        group.sort(key=lambda symbol: symbol.y)
        for upper, lower in itertools.pairwise(group):
            lines.append(Line("join", upper.x, upper.y, lower.x, lower.y))
    return lines, {label: group[0] for label, group in found.items()}


def _box_of(symbol: Symbol) -> Box:
    radius = SYMBOL_RADIUS + 1
    return Box(symbol.x - radius, symbol.y - radius, symbol.x + radius, symbol.y + radius)


def _boxes_along(line: Line) -> list[Box]:
    """Small boxes that a line lies in."""
    across, down = line.x2 - line.x1, line.y2 - line.y1
    count = 1 + int(math.hypot(across, down) / LINE_HEIGHT)
    boxes = []
    for step in range(count):
        x1, y1 = line.x1 + across * step / count, line.y1 + down * step / count
        x2, y2 = x1 + across / count, y1 + down / count
        boxes.append(Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))
    return boxes


def _legend(series: Sequence[str]) -> list[Words]:
    return [Words(x + 12, TOP + 8, name) for x, name in _legend_places(series)]


def _legend_symbols(series: Sequence[str]) -> list[Symbol]:
    if len(series) < 2:
        return []
    places = enumerate(_legend_places(series))
    return [Symbol(x, TOP + 8 - LINE_HEIGHT / 4, number) for number, (x, _) in places]


def _legend_places(series: Sequence[str]) -> list[tuple[float, str]]:
    places, x = [], LEFT + SYMBOL_RADIUS
    for name in series:
        places.append((x, name))
        x += width_of(name) + 36
    return places
