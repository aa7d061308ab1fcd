"""A drawing as SVG, legible on light and dark pages, or as PNG, for which Pillow is needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.budget.chart import HEIGHT, SYMBOL_RADIUS, WIDTH, Drawing, Symbol
from edgellm.budget.labels import FONT_PIXELS
from edgellm.errors import RuntimeMissing, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

PAPER, INK, GRID, JOIN = ("#ffffff", "#12161c"), ("#222222", "#dddddd"), "#88888855", "#888888"
"""Colours, where there are two: on light and on dark pages."""

SERIES = (
    ("#1668b8", "#6cb2f5"),
    ("#c2571a", "#f0a15e"),
    ("#2d7d46", "#7cc894"),
    ("#8a3ca0", "#cf93e0"),
)
"""By series, light and dark; with the shapes they can be told apart without seeing colours too."""

SHAPES = ("circle", "square", "diamond", "triangle")
"""By series too; where colours begin again, other shapes have them."""

PNG_SCALE = 2
"""Pixels of a PNG for one of the drawing."""

SMOOTHING = 2
"""A PNG is drawn so many times larger and then averaged."""


def svg(drawing: Drawing) -> bytes:
    """The SVG document; needs no library."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(drawing.title)}</title><style>{_style()}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
    ]
    for line in drawing.lines:
        kind = line.kind + (f" s{line.series % len(SERIES)}" if line.kind == "error" else "")
        parts.append(
            f'<line class="{kind}" x1="{line.x1:.1f}" y1="{line.y1:.1f}" '
            f'x2="{line.x2:.1f}" y2="{line.y2:.1f}"/>'
        )
    for symbol in drawing.symbols:
        parts.append(
            f'<path class="mark s{symbol.series % len(SERIES)}" '
            f'transform="translate({symbol.x:.1f} {symbol.y:.1f})" d="{_outline(symbol)}"/>'
        )
    for words in drawing.words:
        place = f'x="{words.x:.1f}" y="{words.y:.1f}"'
        if words.turned:
            place = f'transform="translate({words.x:.1f} {words.y:.1f}) rotate(-90)"'
        parts.append(f'<text {place} text-anchor="{words.anchor}">{escape(words.text)}</text>')
    return "\n".join([*parts, "</svg>\n"]).encode()


def png(drawing: Drawing) -> bytes:
    """The PNG file, on white paper. Raises ``RuntimeMissing`` without Pillow."""
    check_pillow()
    from PIL import Image, ImageDraw

    scale = PNG_SCALE * SMOOTHING
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), PAPER[0])
    draw = ImageDraw.Draw(image, "RGBA")
    for line in drawing.lines:
        colours = {"axis": INK[0], "grid": GRID, "join": JOIN}
        colour = colours.get(line.kind) or SERIES[line.series % len(SERIES)][0]
        ends = [scale * each for each in (line.x1, line.y1, line.x2, line.y2)]
        draw.line(ends, fill=colour, width=scale)
    for symbol in drawing.symbols:
        _draw_symbol(draw, symbol, scale)
    _draw_words(image, drawing, scale)
    out = io.BytesIO()
    image.reduce(SMOOTHING).save(out, "PNG", optimize=True)
    return out.getvalue()


PICTURES: dict[str, Callable[[Drawing], bytes]] = {".svg": svg, ".png": png}
"""What can be drawn, by the suffix of the file."""


def check_picture(path: Path) -> None:
    """Raise ``UsageError`` for a suffix that nothing is drawn by, and what that drawing needs."""
    suffix = path.suffix.lower()
    if suffix not in PICTURES:
        raise UsageError(
            f"--picture {path}: a picture is drawn by its suffix, {' or '.join(PICTURES)}, and "
            f"this is {path.suffix or 'without one'}"
        )
    if suffix == ".png":
        check_pillow()


def check_pillow() -> None:
    """Raise ``RuntimeMissing`` where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise RuntimeMissing(
            "a .png picture is drawn by Pillow, which is not installed: pip install Pillow (or pip "
            "install 'edgellm[pictures]'), or choose a .svg, which needs nothing"
        ) from error


def picture(drawing: Drawing, path: Path) -> bytes:
    """The content of ``path``, by its suffix; raises what ``check_picture`` does."""
    check_picture(path)
    return PICTURES[path.suffix.lower()](drawing)


def _style() -> str:
    rules = [
        ":root{color-scheme:light dark}",
        f"text{{font:{FONT_PIXELS}px sans-serif}}.grid{{stroke:{GRID}}}.join{{stroke:{JOIN}}}",
        _theme(0),
        f"@media(prefers-color-scheme:dark){{{_theme(1)}}}",
    ]
    return "".join(rules)


def _theme(which: int) -> str:
    series = "".join(
        f".s{number}{{fill:{colours[which]};stroke:{colours[which]}}}"
        for number, colours in enumerate(SERIES)
    )
    ink = INK[which]
    return f".paper{{fill:{PAPER[which]}}}text{{fill:{ink}}}.axis{{stroke:{ink}}}{series}"


def _corners(symbol: Symbol) -> list[tuple[float, float]]:
    """The corners of a symbol about its centre; empty for a circle. All have about one area."""
    radius = SYMBOL_RADIUS
    half, tip = radius * 0.9, radius * 1.3
    return {
        "circle": [],
        "square": [(-half, -half), (half, -half), (half, half), (-half, half)],
        "diamond": [(0, -tip), (tip, 0), (0, tip), (-tip, 0)],
        "triangle": [(0, -tip), (tip, 0.8 * tip), (-tip, 0.8 * tip)],
    }[SHAPES[(symbol.series + symbol.series // len(SERIES)) % len(SHAPES)]]


def _outline(symbol: Symbol) -> str:
    """A symbol's path about its centre."""
    corners = _corners(symbol)
    if corners:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in corners) + "Z"
    radius = f"{SYMBOL_RADIUS:g}"
    half = f"A{radius} {radius} 0 1 1"
    return f"M-{radius} 0{half} {radius} 0{half} -{radius} 0Z"


def _draw_symbol(draw: ImageDraw, symbol: Symbol, scale: int) -> None:
    colour = SERIES[symbol.series % len(SERIES)][0]
    corners = _corners(symbol)
    if corners:
        draw.polygon([(scale * (symbol.x + x), scale * (symbol.y + y)) for x, y in corners], colour)
    else:
        draw.circle((scale * symbol.x, scale * symbol.y), scale * SYMBOL_RADIUS, colour)


def _draw_words(image: Image, drawing: Drawing, scale: int) -> None:
    """Text in the font that comes inside Pillow: what is installed does not change the picture."""
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_PIXELS * scale)
    for words in drawing.words:
        width, height = font.getlength(words.text), 2 * FONT_PIXELS * scale
        before = {"start": 0.0, "middle": width / 2, "end": width}[words.anchor]
        # Ink on a strip of its own, which can be turned: its baseline is at three quarters.
        strip = images.new("L", (int(width) + 2, height), 0)
        ImageDraw.Draw(strip).text((0, height * 3 // 4), words.text, 255, font, "ls")
        x, y = scale * words.x, scale * words.y
        if words.turned:
            strip = strip.transpose(images.Transpose.ROTATE_90)
            place = (round(x - height * 3 / 4), round(y + before - width))
        else:
            place = (round(x - before), round(y - height * 3 / 4))
        image.paste(INK[0], place, strip)
