"""Writing SVG for a page: shapes with classes that its style sheet colours, and hints on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from edgellm.budget.labels import width_of
from edgellm.report.wording import plain

WIDTH = 460.0
"""Pixels of every chart: fits a phone nearly as it is, and a computer's screen two abreast."""

TINTS = 7
"""Colours of series; after these they begin again."""

DASHES = 4
"""Kinds of lines, and of marks: circle, square, diamond, triangle."""


@dataclass(frozen=True, slots=True)
class Look:
    """Classes for a shape: ``kind`` and the colour of a series (None: of the kind itself)."""

    kind: str
    tint: int | None = None
    dash: int = 0

    def __str__(self) -> str:
        tint = "" if self.tint is None else f" s{self.tint % TINTS}"
        dash = self.dash % DASHES
        return f"{self.kind}{tint}{f' d{dash}' if dash else ''}"


class Canvas:
    """Collects shapes; ``svg`` is the whole. A ``hint`` shows when one points at the shape."""

    def __init__(self, title: str, height: float) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def line(self, look: Look | str, x1: float, y1: float, x2: float, y2: float) -> None:
        ends = f'x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}"'
        self.parts.append(f'<line class="{look}" {ends}/>')

    def rect(
        self, look: Look | str, x: float, y: float, width: float, height: float, hint: str = ""
    ) -> None:
        place = f'x="{_at(x)}" y="{_at(y)}" width="{_at(width)}" height="{_at(height)}"'
        self._hinted("rect", f'class="{look}" {place}', hint)

    def circle(self, look: Look | str, x: float, y: float, radius: float, hint: str = "") -> None:
        place = f'cx="{_at(x)}" cy="{_at(y)}" r="{_at(radius)}"'
        self._hinted("circle", f'class="{look}" {place}', hint)

    def path(self, look: Look | str, outline: str, hint: str = "") -> None:
        self._hinted("path", f'class="{look}" d="{outline}"', hint)

    def curve(
        self, look: Look | str, points: Iterable[tuple[float, float]], hint: str = ""
    ) -> None:
        """A line through ``points``."""
        self.path(look, joined(points), hint)

    def mark(self, tint: int, dash: int, x: float, y: float, hint: str = "") -> None:
        """The mark of a series."""
        self.path(Look("mark", tint), mark_outline(dash, x, y), hint)

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", kind: str = "", hint: str = ""
    ) -> None:
        look = f' class="{kind}"' if kind else ""
        place = f'x="{_at(x)}" y="{_at(y)}"' + (
            "" if anchor == "start" else f' text-anchor="{anchor}"'
        )
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(f"<text{look} {place}>{escape(text)}{title}</text>")

    def svg(self) -> str:
        """The element, to stand inside a page."""
        box = f"0 0 {_at(WIDTH)} {_at(self.height)}"
        head = f'<svg viewBox="{box}" role="img" aria-label="{escape(self.title)}">'
        return "\n".join([head, *self.parts, "</svg>"])

    def _hinted(self, element: str, attributes: str, hint: str) -> None:
        if hint:
            inside = f"<title>{escape(hint)}</title>"
            self.parts.append(f"<{element} {attributes}>{inside}</{element}>")
        else:
            self.parts.append(f"<{element} {attributes}/>")


def line_sign(tint: int, dash: int, *, marked: bool) -> str:
    """A curve's sign for a legend."""
    line = f'<path class="{Look("curve", tint, dash)}" d="M0 6L28 6"/>'
    mark = f'<path class="{Look("mark", tint)}" d="{mark_outline(dash, 14, 6)}"/>' if marked else ""
    return f'<svg class="sign" viewBox="0 0 28 12" aria-hidden="true">{line}{mark}</svg>'


def block_sign(look: str) -> str:
    """A bar's sign for a legend."""
    block = f'<rect class="{look}" y="1" width="14" height="10"/>'
    return f'<svg class="sign block" viewBox="0 0 14 12" aria-hidden="true">{block}</svg>'


def fitted(text: str, room: float) -> str:
    """``text``, its middle left out where it is wider than ``room`` pixels.

    The ends stay: names of artifacts begin alike, and end in their grid.
    """
    text = plain(text)
    letters = int(room / width_of("m"))
    if len(text) <= letters:
        return text
    tail = max(0, (letters - 1) // 2)
    return f"{text[: max(1, letters - 1 - tail)]}…{text[len(text) - tail :]}"


def joined(points: Iterable[tuple[float, float]]) -> str:
    """An outline from point to point."""
    return "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in points)


def mark_outline(dash: int, x: float, y: float, radius: float = 4.0) -> str:
    """A mark's outline about ``(x, y)``."""
    half, tip = radius * 0.9, radius * 1.3
    corners = (
        (),
        ((-half, -half), (half, -half), (half, half), (-half, half)),
        ((0.0, -tip), (tip, 0.0), (0.0, tip), (-tip, 0.0)),
        ((0.0, -tip), (tip, 0.8 * tip), (-tip, 0.8 * tip)),
    )[dash % DASHES]
    if corners:
        return joined((x + right, y + down) for right, down in corners) + "Z"
    arc = f"a{_at(radius)} {_at(radius)} 0 1 1"
    return f"M{_at(x - radius)} {_at(y)}{arc} {_at(2 * radius)} 0{arc} {_at(-2 * radius)} 0Z"


def _at(pixels: float) -> str:
    return f"{pixels:.1f}".removesuffix(".0")
