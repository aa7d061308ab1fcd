"""The picture of a sweep: points stand where their figures say, whatever it is written as."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgellm.budget.chart import Mark, chart
from edgellm.budget.labels import Box, place_labels
from edgellm.budget.picture import GRID, PAPER, PNG_SCALE, SERIES, check_picture, picture, png, svg
from edgellm.budget.sweeping import quants
from edgellm.errors import RuntimeMissing, UsageError

SVG = "{http://www.w3.org/2000/svg}"
MARKS = [
    Mark("a<b", 90_000_000, 0.3, 0.02, "one"),
    Mark("c", 104_000_000, 0.11, 0.001, "one"),
    Mark("a<b", 91_500_000, 0.024, 0, "two"),
    Mark("same", 100_000_000, 0.0, 0.0, "two"),
]
DRAWN = [(mark.nbytes / 1e6, mark.kl) for mark in MARKS if mark.kl]


class Axes:
    """Values of places, read off the numbers at the axes."""

    def __init__(self, document: ElementTree.Element) -> None:
        words = [(each.text or "", each.attrib) for each in document.iter(f"{SVG}text")]
        sizes = [(at["x"], text) for text, at in words if number(text, at, "middle")]
        kls = [(at["y"], text) for text, at in words if number(text, at, "end")]
        self.x = np.array([(float(x), float(text)) for x, text in sizes])
        # Baselines are four pixels below the lines.
        self.y = np.array(sorted((float(y) - 4, math.log10(float(text))) for y, text in kls))

    def read(self, x: float, y: float) -> tuple[float, float]:
        slope, first = np.polyfit(*self.x.T, 1)
        steepness, top = np.polyfit(*self.y.T, 1)
        return slope * x + first, 10 ** (steepness * y + top)


def number(text: str, attributes: dict[str, str], anchor: str) -> bool:
    return attributes["text-anchor"] == anchor and bool(re.fullmatch(r"[\d.]+", text))


def symbols(document: ElementTree.Element) -> list[tuple[str, float, float]]:
    """Class and place of each symbol."""
    found = []
    for each in document.iter(f"{SVG}path"):
        x, y = re.findall(r"[\d.]+", each.attrib["transform"])
        found.append((each.attrib["class"], float(x), float(y)))
    return found


def test_points_of_an_svg_stand_at_their_figures() -> None:
    document = ElementTree.fromstring(svg(chart(MARKS, "x & y")))
    axes = Axes(document)
    found = symbols(document)
    for (kind, x, y), expected, series in zip(found, DRAWN, ("s0", "s0", "s1"), strict=False):
        assert kind == f"mark {series}"
        assert axes.read(x, y) == pytest.approx(expected, rel=5e-3)
    assert len(found) == len(DRAWN) + 2  # the legend's
    words = [each.text for each in document.iter(f"{SVG}text")]
    assert {"a<b", "c", "x & y", "one", "two", "not shown, KL 0: same"} <= set(words)
    assert words.count("a<b") == 1  # its two points are joined


def test_points_of_a_png_stand_at_their_figures() -> None:
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    drawing = chart(MARKS, "x & y")
    document = ElementTree.fromstring(svg(drawing))
    axes = Axes(document)
    pixels = np.asarray(images.open(io.BytesIO(png(drawing))).convert("RGB")).astype(int)
    assert pixels.shape == (480 * PNG_SCALE, 760 * PNG_SCALE, 3)
    assert (pixels[-1, -1] == colour(PAPER[0])).all()
    # Its own lines must be at the numbers that the SVG has, for points to be read off those.
    alpha = int(GRID[7:], 16) / 255
    line = colour(PAPER[0]) * (1 - alpha) + colour(GRID[:7]) * alpha
    plain = np.abs(pixels - line).max(axis=2) < 12
    upright = np.flatnonzero(plain.mean(axis=0) > 0.6) / PNG_SCALE
    assert all(np.abs(upright - x).min() < 1 for x, _ in axes.x)
    flat = np.flatnonzero(plain.mean(axis=1) > 0.6) / PNG_SCALE
    assert all(np.abs(flat - y).min() < 1 for y, _ in axes.y[:-1])
    for (size, kl), series in zip(DRAWN, (0, 0, 1), strict=True):
        of_series = np.abs(pixels - colour(SERIES[series][0])).max(axis=2) < 24
        rows, columns = np.nonzero(of_series)
        places = np.stack([columns, rows], 1) / PNG_SCALE
        at = np.array([place(axes.x[:, 1], axes.x[:, 0], size), place(*axes.y.T[::-1], kl=kl)])
        near = places[np.abs(places - at).max(axis=1) < 6]
        assert len(near) > 150
        assert near.mean(axis=0) == pytest.approx(at, abs=0.8)
    ink = (pixels < 100).all(axis=2)
    assert ink[: 26 * PNG_SCALE].any()  # the title
    assert ink[:, : 30 * PNG_SCALE].any()  # the name of the KL axis


def place(values: np.ndarray, places: np.ndarray, size: float = 0, kl: float = 0) -> float:
    """Where an axis has a value."""
    slope, first = np.polyfit(values, places, 1)
    return float(slope * (math.log10(kl) if kl else size) + first)


def colour(text: str) -> np.ndarray:
    return np.array([int(text[start : start + 2], 16) for start in (1, 3, 5)])


def test_labels_cover_neither_each_other_nor_points() -> None:
    points = [(f"grid-{number}", 300.0 + 9 * number, 200.0 + 3 * number) for number in range(8)]
    obstacles = [Box(x - 6, y - 6, x + 6, y + 6) for _, x, y in points]
    bounds = Box(0, 0, 700, 400)
    boxes = [label.box for label in place_labels(points, obstacles, bounds)]
    assert all(box.outside(bounds) == 0 for box in boxes)
    for number, box in enumerate(boxes):
        assert not any(box.shared(other) for other in [*boxes[number + 1 :], *obstacles])


def test_both_themes_have_colours() -> None:
    document = svg(chart([Mark("a", 10**6, 0.1, 0.01)], "t")).decode()
    light, dark = document.split("@media(prefers-color-scheme:dark)")
    for theme, which in ((light, 0), (dark, 1)):
        assert f".paper{{fill:{PAPER[which]}}}" in theme
        assert f".s1{{fill:{SERIES[1][which]};" in theme


def test_series_are_told_apart_past_the_last_colour() -> None:
    marks = [Mark("a", 10**8, 0.1 + n / 100, 0, f"solver {n}") for n in range(8)]
    document = ElementTree.fromstring(svg(chart(marks, "t")))
    looks = {(each.attrib["class"], each.attrib["d"]) for each in document.iter(f"{SVG}path")}
    assert len(looks) == 8


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no point"):
        chart([Mark("a", 1, 0.0, 0.0)], "t")


def test_a_suffix_that_is_not_drawn_is_refused() -> None:
    for name in ("a.gif", "a"):
        with pytest.raises(UsageError, match=r"\.svg or \.png"):
            check_picture(Path(name))
    check_picture(Path("a.SVG"))


def test_a_png_without_pillow_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeMissing, match=r"pip install 'edgellm\[pictures\]'"):
        check_picture(Path("a.png"))
    assert picture(chart(MARKS, "t"), Path("a.svg")).startswith(b"<svg")


def test_every_grid_by_every_solver() -> None:
    assert quants(["q4_0", "q8_0"], ["rtn", "gptq"]) == [
        "rtn:q4_0", "gptq:q4_0", "rtn:q8_0", "gptq:q8_0",
    ]  # fmt: skip
    assert quants(["q4_0"], []) == ["q4_0"]
    for grids in ([], ["gptq"], ["q4_0", "q4_0"]):
        with pytest.raises(UsageError):
            quants(grids, [])
