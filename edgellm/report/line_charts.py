"""Charts of curves over a length or a count, and of points between two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.budget.labels import Box, place_labels, width_of
from edgellm.report.scales import (
    LOGARITHMIC_FROM,
    Scale,
    decade_ticks,
    round_ticks,
    round_top,
    spread,
    tick_text,
)
from edgellm.report.svg import WIDTH, Canvas, Look, fitted, joined

HEIGHT = 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, WIDTH - 14.0, 26.0, HEIGHT - 44.0
LABEL_ROOM = 260.0
MOST_RADIUS = 15.0


@dataclass(frozen=True, slots=True)
class Place:
    """A point of a curve and where it may lie up and down."""

    x: float
    y: float
    low: float
    high: float
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """Places from left to right. Few have marks and whiskers, many a band."""

    label: str
    places: tuple[Place, ...]
    tint: int
    dash: int = 0
    band: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A point with its name; ``weight`` is its area."""

    label: str
    x: float
    y: float
    weight: float
    tint: int
    hint: str = ""


def curves(
    title: str, across: str, up: str, drawn: Sequence[Curve], *, top: float | None = None
) -> str:
    """Curves over a common axis from 0 up to ``top`` (None: to the highest place)."""
    canvas = Canvas(title, HEIGHT)
    places = [place for curve in drawn for place in curve.places]
    highest = max(place.high for place in places) if top is None else top
    xs = sorted({place.x for place in places})
    few = not any(curve.band for curve in drawn)
    vertical = Scale(0.0, round_top(highest), BOTTOM, TOP)
    horizontal = _lengths(xs) if few else Scale(0.0, xs[-1], LEFT, RIGHT)
    ticks = xs if few else round_ticks(0.0, xs[-1])
    room = max(width_of(tick_text(tick)) for tick in ticks) + 4
    _axes(canvas, horizontal, vertical, (across, up), spread(ticks, horizontal, room))
    for curve in drawn:
        if curve.band:
            edge = [(horizontal.at(each.x), vertical.at(each.high)) for each in curve.places]
            back = [(horizontal.at(each.x), vertical.at(each.low)) for each in curve.places]
            canvas.path(Look("band", curve.tint), joined([*edge, *reversed(back)]) + "Z")
    for curve in drawn:
        points = [(horizontal.at(each.x), vertical.at(each.y)) for each in curve.places]
        canvas.curve(Look("curve", curve.tint, curve.dash), points, curve.label)
        if curve.band:
            continue
        for place, (x, y) in zip(curve.places, points, strict=True):
            for end in (place.low, place.high):
                canvas.line(Look("stem", curve.tint), x, y, x, vertical.at(end))
                canvas.line(
                    Look("stem", curve.tint), x - 3, vertical.at(end), x + 3, vertical.at(end)
                )
            canvas.mark(curve.tint, curve.dash, x, y, place.hint or curve.label)
    return canvas.svg()


def scatter(title: str, across: str, up: str, dots: Sequence[Dot]) -> str:
    """Dots with their names beside them; the vertical axis is logarithmic where they span much."""
    canvas = Canvas(title, HEIGHT + 40)
    bottom = BOTTOM + 40
    wide = max(dot.x for dot in dots)
    horizontal = Scale(0.0, round_top(wide * 1.08), LEFT, RIGHT)
    least, most = min(dot.y for dot in dots), max(dot.y for dot in dots)
    if least > 0 and most / least > LOGARITHMIC_FROM:
        ladder = decade_ticks(least / 1.3, most * 1.3)
        vertical = Scale(ladder[0], ladder[-1], bottom, TOP, logarithmic=True)
    else:
        vertical = Scale(0.0, round_top(most * 1.1), bottom, TOP)
        ladder = round_ticks(0.0, vertical.high)
    ticks = round_ticks(0.0, horizontal.high)
    _axes(canvas, horizontal, vertical, (across, up), ticks, spread(ladder, vertical, 16))
    heaviest = max(dot.weight for dot in dots) or 1.0
    boxes: list[Box] = []
    points, radii = [], []
    for dot in sorted(dots, key=lambda dot: -dot.weight):
        x, y = horizontal.at(dot.x), vertical.at(dot.y)
        radius = max(3.0, MOST_RADIUS * math.sqrt(max(dot.weight, 0.0) / heaviest))
        canvas.circle(Look("dot", dot.tint), x, y, radius, dot.hint)
        boxes.append(Box(x - radius, y - radius, x + radius, y + radius))
        points.append((fitted(dot.label, LABEL_ROOM), x, y))
        radii.append(radius)
    bounds = Box(LEFT + 2, TOP, RIGHT, bottom - 2)
    for label, radius in zip(place_labels(points, boxes, bounds), radii, strict=True):
        if label.leader:
            _leader(canvas, label.leader, radius)
        canvas.text(label.x, label.y, label.text, label.anchor, "label halo")
    return canvas.svg()


def _leader(canvas: Canvas, ends: tuple[float, float, float, float], radius: float) -> None:
    """A line from a dot's edge to its name."""
    x1, y1, x2, y2 = ends
    distance = math.hypot(x2 - x1, y2 - y1)
    if distance > radius + 3:
        share = radius / distance
        canvas.line("leader", x1 + (x2 - x1) * share, y1 + (y2 - y1) * share, x2, y2)


def _lengths(xs: Sequence[float]) -> Scale:
    """Over the lengths that were measured; logarithmic where they are far apart."""
    if xs[0] > 0 and xs[-1] / xs[0] >= LOGARITHMIC_FROM:
        return Scale(xs[0] / 1.15, xs[-1] * 1.15, LEFT, RIGHT, logarithmic=True)
    margin = (xs[-1] - xs[0]) * 0.06
    return Scale(xs[0] - margin, xs[-1] + margin, LEFT, RIGHT)


def _axes(
    canvas: Canvas,
    horizontal: Scale,
    vertical: Scale,
    names: tuple[str, str],
    ticks: Sequence[float],
    ladder: Sequence[float] | None = None,
) -> None:
    across, up = names
    bottom = vertical.start
    for tick in round_ticks(vertical.low, vertical.high) if ladder is None else ladder:
        y = vertical.at(tick)
        canvas.line("grid", LEFT, y, RIGHT, y)
        canvas.text(LEFT - 8, y + 4, tick_text(tick), "end", "tick")
    for tick in ticks:
        x, text = horizontal.at(tick), tick_text(tick)
        canvas.line("axis", x, bottom, x, bottom + 4)
        canvas.text(min(x, WIDTH - width_of(text) / 2), bottom + 18, text, "middle", "tick")
    canvas.line("axis", LEFT, bottom, RIGHT, bottom)
    canvas.text((LEFT + RIGHT) / 2, bottom + 37, across, "middle", "name")
    canvas.text(2, 12, up, kind="name")
