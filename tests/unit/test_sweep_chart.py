"""The picture of a sweep: points stand where their figures say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from edgellm.budget.chart import Mark, chart
from edgellm.budget.sweeping import quants
from edgellm.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"


def test_points_stand_at_their_logarithms() -> None:
    marks = [Mark("a<b", 10**8, 1e-3, 1e-4), Mark("b", 2 * 10**8, 1e-2, 0), Mark("c", 10**8, 1, 0)]
    picture = ElementTree.fromstring(chart([*marks, Mark("same", 10**8, 0.0, 0.0)], "x & y"))
    circles = [
        (float(each.attrib["cx"]), float(each.attrib["cy"]))
        for each in picture.iter(f"{SVG}circle")
    ]
    assert len(circles) == 3
    (ax, ay), (bx, by), (cx, cy) = circles
    assert ax == cx
    assert bx - 80 == pytest.approx(2 * (ax - 80), abs=0.2)
    assert (ay - by) * 2 == pytest.approx(by - cy, abs=0.3)
    assert ay > by > cy
    words = [each.text for each in picture.iter(f"{SVG}text")]
    assert {"a<b", "b", "c", "x & y", "0.001", "1"} <= set(words)
    assert "same" not in words


def test_both_themes_have_colours() -> None:
    picture = chart([Mark("a", 10**6, 0.1, 0.01)], "t")
    assert re.search(r"prefers-color-scheme:dark\)\{text\{fill:#ddd\}", picture)


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no point"):
        chart([Mark("a", 1, 0.0, 0.0)], "t")


def test_every_grid_by_every_solver() -> None:
    assert quants(["q4_0", "q8_0"], ["rtn", "gptq"]) == [
        "rtn:q4_0", "gptq:q4_0", "rtn:q8_0", "gptq:q8_0",
    ]  # fmt: skip
    assert quants(["q4_0"], []) == ["q4_0"]
    for grids in ([], ["gptq"], ["q4_0", "q4_0"]):
        with pytest.raises(UsageError):
            quants(grids, [])
