"""Charts of a line for each cell: bars, spans about a value, and boxes of distributions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgellm.budget.labels import width_of
from edgellm.report.scales import Scale, round_ticks, round_top, tick_text
from edgellm.report.svg import WIDTH, Canvas, Look, fitted

LEFT, RIGHT = 10.0, WIDTH - 16.0
LABEL_HEIGHT = 18.0
LINE_HEIGHT = 14.0
"""Of the second line of a label."""
BREAKS = re.compile(r"(?<=, )|(?<= / )")
"""Where a label may go on in a second line: behind one of its settings, or one of two cells."""
BAR_HEIGHT = 14.0
THIN_BAR_HEIGHT = 7.0
GAP = 12.0
AXIS_HEIGHT = 40.0
TOP = 4.0
BEYOND = 1.15
"""An axis reaches so much further than its reference, whose line then crosses no number."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A length; ``low`` and ``high``: its interval, if it has one."""

    value: float
    look: Look
    low: float | None = None
    high: float | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class BarRow:
    """What stands above the bars, left and right, and the bars below each other."""

    label: str
    shown: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """How samples spread. ``strip``: some of them, drawn as dots below; ``most``: the largest."""

    label: str
    shown: str
    look: Look
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float
    most: float
    strip: tuple[float, ...] = field(default=())


def bars(title: str, axis: str, rows: Sequence[BarRow], reference: float | None = None) -> str:
    """Bars from 0 on; a line at ``reference`` where there is one."""
    ends = [max(bar.value, bar.high or 0.0) for row in rows for bar in row.bars]
    top = round_top(max([*ends, (reference or 0.0) * BEYOND]))
    thick = BAR_HEIGHT if max(len(row.bars) for row in rows) == 1 else THIN_BAR_HEIGHT
    heights = [_label_height(row) + len(row.bars) * thick + GAP for row in rows]
    canvas, scale = _framed(title, axis, sum(heights), Scale(0.0, top, LEFT, RIGHT))
    if reference is not None:
        _upright(canvas, scale, reference)
    y = TOP
    for row, height in zip(rows, heights, strict=True):
        below = _label(canvas, y, row)
        for number, bar in enumerate(row.bars):
            upper = below + number * thick
            width = scale.at(bar.value) - LEFT
            canvas.rect(bar.look, LEFT, upper, width, thick - 1, bar.hint)
            if bar.low is not None and bar.high is not None:
                _whisker(canvas, scale, bar.low, bar.high, upper + (thick - 1) / 2)
        y += height
    return canvas.svg()


def spans(title: str, axis: str, rows: Sequence[BarRow], reference: float) -> str:
    """A mark and its interval for each bar, about a line at ``reference``."""
    held = [bar for row in rows for bar in row.bars]
    lows = [bar.value if bar.low is None else bar.low for bar in held]
    highs = [bar.value if bar.high is None else bar.high for bar in held]
    low, high = min([*lows, reference]), max([*highs, reference])
    margin = (high - low) * 0.06 or 0.1
    heights = [_label_height(row) + len(row.bars) * BAR_HEIGHT + GAP / 2 for row in rows]
    ends = Scale(max(0.0, low - margin), high + margin, LEFT, RIGHT)
    canvas, scale = _framed(title, axis, sum(heights), ends)
    _upright(canvas, scale, reference)
    y = TOP
    for row, height in zip(rows, heights, strict=True):
        below = _label(canvas, y, row)
        for number, bar in enumerate(row.bars):
            middle = below + (number + 0.5) * BAR_HEIGHT - 1
            if bar.low is not None and bar.high is not None:
                _whisker(canvas, scale, bar.low, bar.high, middle)
            canvas.circle(bar.look, scale.at(bar.value), middle, 4.5, bar.hint)
        y += height
    return canvas.svg()


def boxes(title: str, axis: str, rows: Sequence[Box]) -> str:
    """A box for each distribution; the axis ends where 99 of 100 samples of all have a place."""
    top = round_top(max(row.p99 for row in rows) * 1.05)
    heights = [_label_height(row) + BAR_HEIGHT + 12 + GAP for row in rows]
    canvas, scale = _framed(title, axis, sum(heights), Scale(0.0, top, LEFT, RIGHT))
    y = TOP
    for row, height in zip(rows, heights, strict=True):
        upper = _label(canvas, y, row)
        middle = upper + BAR_HEIGHT / 2
        left, right = scale.at(row.p25), scale.at(row.p75)
        canvas.line(
            Look("stem", row.look.tint), scale.at(row.p5), middle, scale.at(row.p95), middle
        )
        for end in (row.p5, row.p95):
            x = scale.at(end)
            canvas.line(Look("stem", row.look.tint), x, middle - 4, x, middle + 4)
        canvas.rect(row.look, left, upper, max(right - left, 1.5), BAR_HEIGHT, row.shown)
        x = scale.at(row.p50)
        canvas.line("median", x, upper - 1, x, upper + BAR_HEIGHT + 1)
        x = scale.at(row.p99)
        canvas.mark(row.look.tint or 0, 2, x, middle, f"99th percentile: {tick_text(row.p99)}")
        dots = [each for each in row.strip if each <= top]
        if dots:
            dot_y = upper + BAR_HEIGHT + 8
            outline = "".join(f"M{scale.at(each):.1f} {dot_y:.1f}h0" for each in dots)
            canvas.path(Look("strip", row.look.tint), outline)
        y += height
    return canvas.svg()


def _framed(title: str, axis: str, height: float, scale: Scale) -> tuple[Canvas, Scale]:
    """A canvas with its axis below ``height`` pixels of rows, and lines up from its numbers."""
    bottom = TOP + height
    canvas = Canvas(title, bottom + AXIS_HEIGHT)
    for tick in round_ticks(scale.low, scale.high):
        x, text = scale.at(tick), tick_text(tick)
        canvas.line("grid", x, TOP, x, bottom)
        half = width_of(text) / 2
        x = min(max(x, half + 1), WIDTH - half - 1) if tick else x
        canvas.text(x, bottom + 15, text, "middle", "tick")
    canvas.line("axis", LEFT, bottom, RIGHT, bottom)
    canvas.text((LEFT + RIGHT) / 2, bottom + 33, axis, "middle", "name")
    return canvas, scale


def _label(canvas: Canvas, y: float, row: BarRow | Box) -> float:
    """Write what stands above a row's bars; where these begin."""
    lines = _lines(row.label, row.shown)
    hint = row.label if any("…" in line for line in lines) else ""
    for number, line in enumerate(lines):
        canvas.text(LEFT, y + 13 + number * LINE_HEIGHT, line, kind="label", hint=hint)
    canvas.text(RIGHT, y + 13, row.shown, "end", "shown")
    return y + _label_height(row)


def _label_height(row: BarRow | Box) -> float:
    return LABEL_HEIGHT + (len(_lines(row.label, row.shown)) - 1) * LINE_HEIGHT


def _lines(label: str, shown: str) -> tuple[str, ...]:
    """``label`` in one line beside ``shown``, or in two: its settings are what tells it apart."""
    room = RIGHT - LEFT - width_of(shown) * 0.85 - 12
    words = BREAKS.split(label)
    if width_of(label) <= room or len(words) == 1:
        return (fitted(label, room),)
    first = words.pop(0)
    while len(words) > 1 and width_of(first + words[0]) <= room:
        first += words.pop(0)
    return fitted(first, room), fitted("".join(words), RIGHT - LEFT)


def _upright(canvas: Canvas, scale: Scale, reference: float) -> None:
    x = scale.at(reference)
    canvas.line("reference", x, TOP, x, canvas.height - AXIS_HEIGHT)


def _whisker(canvas: Canvas, scale: Scale, low: float, high: float, y: float) -> None:
    left, right = scale.at(low), scale.at(high)
    canvas.line("whisker", left, y, right, y)
    for x in (left, right):
        canvas.line("whisker", x, y - 3, x, y + 3)
