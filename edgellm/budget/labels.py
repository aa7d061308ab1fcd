"""Where the labels of points stand, so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FONT_PIXELS = 13
LINE_HEIGHT = 15.0
LETTER_WIDTH = 8.0
"""Of the widest of the usual sans-serif fonts, on average; the reader's may be narrower."""

RINGS = (10.0, 20.0, 32.0, 46.0, 62.0)
"""Distances from the point that are tried."""

DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
"""Right first: that is where one looks."""

ROUNDS = 4
COVERED = 50.0
"""What a covered square pixel costs, in pixels of distance."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """Square pixels that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, other: Box) -> float:
        """Square pixels of this one that ``other`` does not cover."""
        return (self.right - self.left) * (self.bottom - self.top) - self.shared(other)


@dataclass(frozen=True, slots=True)
class Label:
    """A label in its place; ``leader`` is a line ``(x1, y1, x2, y2)`` to a point further off."""

    text: str
    x: float
    y: float
    anchor: str
    box: Box
    leader: tuple[float, float, float, float] | None
    distance: float


def width_of(text: str) -> float:
    """Pixels that a line of text takes at the most, about."""
    return LETTER_WIDTH * len(text)


def place_labels(
    points: Sequence[tuple[str, float, float]], obstacles: Sequence[Box], bounds: Box
) -> list[Label]:
    """A label for each ``(text, x, y)``, in the same order.

    Each takes the place that covers least of the others and of ``obstacles`` and is near its point;
    then each looks again, now that all others stand.
    """
    candidates = [_candidates(*point) for point in points]
    placed: dict[int, Label] = {}
    for _ in range(ROUNDS):
        for number, choices in enumerate(candidates):
            others = [label.box for place, label in placed.items() if place != number]
            placed[number] = min(
                choices,
                key=lambda label: _cost(label, [*others, *obstacles], bounds),
            )
    return [placed[number] for number in range(len(points))]


def _cost(label: Label, others: Sequence[Box], bounds: Box) -> float:
    covered = sum(label.box.shared(other) for other in others) + label.box.outside(bounds)
    return COVERED * covered + label.distance


def _candidates(text: str, x: float, y: float) -> list[Label]:
    """Places in rings about the point, the best liked first."""
    labels = []
    width = width_of(text)
    for ring, radius in enumerate(RINGS):
        for rank, (right, down) in enumerate(DIRECTIONS):
            # The near edge of the text is ``radius`` away; the ring's corners are a bit nearer.
            reach = radius * (0.8 if right and down else 1.0)
            at_x = x + reach * right
            middle = y + (reach + LINE_HEIGHT / 4) * down
            left = at_x - width * (1 - right) / 2
            box = Box(left, middle - LINE_HEIGHT / 2, left + width, middle + LINE_HEIGHT / 2)
            labels.append(
                Label(
                    text=text,
                    x=at_x,
                    y=middle + FONT_PIXELS / 3,
                    anchor={1: "start", 0: "middle", -1: "end"}[right],
                    box=box,
                    leader=(x, y, *_edge(box, x, y)) if ring else None,
                    distance=radius + rank,
                )
            )
    return labels


def _edge(box: Box, x: float, y: float) -> tuple[float, float]:
    """The point of the box that is nearest to ``(x, y)``."""
    return min(max(x, box.left - 2), box.right + 2), min(max(y, box.top + 2), box.bottom - 2)
