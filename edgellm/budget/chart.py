"""A picture of KL against size as SVG, legible on light and dark pages; needs no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 150, 30, 60
"""Room around the plot in pixels: for the axes' labels, and on the right for the points'."""

STYLE = (
    ":root{color-scheme:light dark}text{font:13px sans-serif;fill:#222}"
    ".axis{stroke:#222}.grid{stroke:#8885}.mark{fill:#1668b8}.error{stroke:#1668b8}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#ddd}"
    ".mark{fill:#6cb2f5}.error{stroke:#6cb2f5}}"
)


@dataclass(frozen=True, slots=True)
class Mark:
    """One point: its size, its KL in nats a token and the standard error of that."""

    label: str
    nbytes: int
    kl: float
    kl_error: float


def chart(marks: Sequence[Mark], title: str) -> str:
    """The SVG document; KL on a logarithmic axis, on which a point of 0 or less has no place.

    Raises ``ValueError`` where no point has one.
    """
    shown = [mark for mark in marks if mark.kl > 0]
    if not shown:
        raise ValueError("no point has a KL above 0")
    largest = max(mark.nbytes for mark in shown) * 1.05 / 1e6
    low = math.floor(math.log10(min(mark.kl for mark in shown)))
    high = math.ceil(math.log10(max(mark.kl + mark.kl_error for mark in shown)))
    high = max(high, low + 1)

    def across(megabytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * megabytes / largest

    def down(kl: float) -> float:
        share = (math.log10(max(kl, 10.0**low)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    bottom = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        y = down(10.0**power)
        parts += [
            _line("grid", LEFT, y, WIDTH - RIGHT, y),
            _text(LEFT - 8, y + 4, f"{10.0**power:g}", "end"),
        ]
    for megabytes in _ticks(largest):
        x = across(megabytes)
        parts += [
            _line("grid", x, TOP, x, bottom),
            _text(x, bottom + 18, f"{megabytes:g}", "middle"),
        ]
    middle = (TOP + bottom) / 2
    parts += [
        _line("axis", LEFT, bottom, WIDTH - RIGHT, bottom),
        _line("axis", LEFT, TOP, LEFT, bottom),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "size of all files, MB", "middle"),
        f'<text text-anchor="middle" transform="translate(20 {middle:.1f}) rotate(-90)">'
        "KL to the source, nats a token</text>",
    ]
    for mark in shown:
        x, y = across(mark.nbytes / 1e6), down(mark.kl)
        upper, lower = down(mark.kl + mark.kl_error), down(mark.kl - mark.kl_error)
        parts += [
            _line("error", x, upper, x, lower),
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
            _text(x + 8, y + 4, mark.label, "start"),
        ]
    return "\n".join([*parts, "</svg>\n"])


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _ticks(largest: float) -> list[float]:
    """Round steps of which four to ten reach ``largest``."""
    step = 10.0 ** math.floor(math.log10(largest))
    for part in (1, 0.5, 0.2, 0.1):
        if largest / (step * part) >= 4:
            step *= part
            break
    return [count * step for count in range(int(largest / step) + 1)]
