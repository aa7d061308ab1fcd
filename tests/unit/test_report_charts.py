"""Charts: what stands where, for figures that are known."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from edgellm.profiling.document import Distribution
from edgellm.report import charts, curve_charts
from edgellm.report.line_charts import BOTTOM, TOP, Curve, Dot, Place, curves, scatter
from edgellm.report.quantities import DECODE
from edgellm.report.row_charts import Bar, BarRow, Box, bars, boxes, spans
from edgellm.report.rows import rows
from edgellm.report.scales import (
    Scale,
    decade_ticks,
    round_ticks,
    round_top,
    spread,
    tick_text,
)
from edgellm.report.svg import Look, fitted

from . import profile_documents as documents


def elements(svg: str, tag: str, look: str) -> list[ElementTree.Element]:
    return [
        each
        for each in ElementTree.fromstring(svg).iter(tag)
        if each.get("class", "").split()[:1] == [look]
    ]


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name, "nan"))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 50, [0, 10, 20, 30, 40, 50]),
        (0, 0.03, [0, 0.01, 0.02, 0.03]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.83, 1.85, [1, 1.2, 1.4, 1.6, 1.8]),
        (0, 7, [0, 2, 4, 6]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_no_range_has_too_many_ticks() -> None:
    random = np.random.default_rng(0)
    for high in 10 ** random.uniform(-6, 9, 300):
        assert 2 <= len(round_ticks(0, high)) <= 6
        assert round_top(high) >= high
        assert round_top(high) <= high * 2


def test_ticks_of_a_logarithm_enclose() -> None:
    assert decade_ticks(0.002, 0.3) == pytest.approx(
        [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    )


def test_ticks_that_would_collide_are_left_out() -> None:
    scale = Scale(0, 100, 0, 100)
    assert spread([0, 50, 90, 100], scale, 20) == [0, 50, 100]


def test_scales_map_ends_to_ends_and_clip() -> None:
    scale = Scale(1, 100, 10, 30, logarithmic=True)
    assert [scale.at(value) for value in (1, 10, 100, 1000, 0.1)] == [10, 20, 30, 30, 10]


def test_numbers_at_axes() -> None:
    assert [tick_text(each) for each in (0, 2.5, 1000, 0.0002)] == ["0", "2.5", "1,000", "0.0002"]


def test_a_bar_of_twice_the_figure_is_twice_as_long() -> None:
    rows_ = [
        BarRow(name, "", (Bar(value, Look("bar"), value - 1, value + 1),))
        for name, value in (("a", 10.0), ("b", 20.0))
    ]
    svg = bars("t", "tokens/s", rows_)
    short, long = (number(each, "width") for each in elements(svg, "rect", "bar"))
    assert long == pytest.approx(2 * short, rel=0.005)
    whisker = next(
        each
        for each in elements(svg, "line", "whisker")
        if number(each, "x1") != number(each, "x2")
    )
    scale = short / 10
    assert number(whisker, "x2") - number(whisker, "x1") == pytest.approx(2 * scale, abs=0.2)


def test_bars_of_nothing_have_no_length() -> None:
    svg = bars("t", "MB", [BarRow("a", "", (Bar(0.0, Look("bar")),))])
    assert [number(each, "width") for each in elements(svg, "rect", "bar")] == [0]


def test_the_line_at_one_lies_between_slower_and_faster() -> None:
    held = [
        BarRow(name, "", (Bar(value, Look("point"), value * 0.9, value * 1.1),))
        for name, value in (("slow", 0.5), ("fast", 2.0))
    ]
    svg = spans("t", "ratio", held, 1.0)
    slow, fast = (number(each, "cx") for each in elements(svg, "circle", "point"))
    (one,) = elements(svg, "line", "reference")
    assert slow < number(one, "x1") < fast
    assert (number(one, "x1") - slow) / (fast - slow) == pytest.approx(1 / 3, abs=0.005)


def test_labels_keep_the_settings_that_tell_cells_apart() -> None:
    names = [
        f"profiled-q4_k_m, onnxruntime-genai, {threads}, {prompt} in, depth 0 (noisy)"
        for threads in ("1 thread", "2 threads")
        for prompt in (16, 64)
    ]
    look = Look("box", 0)
    drawn = {
        "bars": bars("t", "s", [BarRow(name, "57.6", (Bar(1.0, look),)) for name in names]),
        "spans": spans("t", "s", [BarRow(name, "57.6", (Bar(1.0, look),)) for name in names], 1),
        "boxes": boxes(
            "t", "ms", [Box(name, "45.1 / 80.4 / 81.0", look, 1, 2, 3, 4, 5, 6, 7)
                        for name in names]
        ),
    }  # fmt: skip
    for kind, svg in drawn.items():
        labels = [each for each in elements(svg, "text", "label") if each.text]
        told = " ".join(each.text or "" for each in labels)
        assert all(name in told for name in names), kind
        heights = [number(each, "y") for each in labels]
        assert len(labels) == 8, kind
        assert heights == sorted(set(heights)), kind
    short = bars("t", "s", [BarRow("a, b", "1", (Bar(1.0, look),))])
    assert len(elements(short, "text", "label")) == 1, "what fits stays in one line"


def test_boxes_hold_the_middle_half() -> None:
    held = Box("a", "", Look("box", 0), 10, 20, 30, 40, 50, 60, 900, strip=(10.0, 30.0, 900.0))
    svg = boxes("t", "ms", [held])
    (box,) = elements(svg, "rect", "box")
    (median,) = elements(svg, "line", "median")
    assert number(median, "x1") == pytest.approx(
        number(box, "x") + number(box, "width") / 2, abs=0.1
    )
    (strip,) = elements(svg, "path", "strip")
    assert strip.get("d", "").count("M") == 2  # the stall is off the axis


def test_curves_rise_with_the_figure() -> None:
    places = tuple(Place(x, y, y, y) for x, y in ((0.0, 0.0), (10.0, 50.0), (20.0, 100.0)))
    svg = curves("t", "x", "y", [Curve("a", places, 0, band=True)], top=100.0)
    (line,) = elements(svg, "path", "curve")
    points = [tuple(map(float, pair.split())) for pair in line.get("d", "")[1:].split("L")]
    assert [y for _, y in points] == pytest.approx([BOTTOM, (TOP + BOTTOM) / 2, TOP])
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)


def test_area_of_dots_is_their_speed() -> None:
    dots = [Dot("slow", 100, 0.1, 10, 0), Dot("fast", 200, 0.05, 40, 1)]
    fast, slow = (
        number(each, "r") for each in elements(scatter("t", "MB", "KL", dots), "circle", "dot")
    )
    assert fast == pytest.approx(2 * slow)


def test_labels_of_dots_do_not_cover_each_other() -> None:
    dots = [Dot(f"artifact-{n}", 100 + n, 0.1, 10, n) for n in range(4)]
    texts = [
        each
        for each in ElementTree.fromstring(scatter("t", "MB", "KL", dots)).iter("text")
        if "halo" in each.get("class", "")
    ]
    assert len({each.get("y") for each in texts}) == 4


def test_a_dot_of_divergence_zero_has_a_place() -> None:
    svg = scatter("t", "MB", "KL", [Dot("a", 1, 0.0, 1, 0), Dot("b", 2, 0.5, 1, 0)])
    assert len(elements(svg, "circle", "dot")) == 2


def test_long_names_keep_both_ends() -> None:
    assert fitted("short", 100) == "short"
    cut = fitted("smollm2-135m-instruct-q4_k_m", 120)
    assert cut.startswith("smollm2")
    assert cut.endswith("q4_k_m")
    assert len(cut) == 15


def test_the_timeline_is_the_median_of_the_rounds() -> None:
    samples = (0.010, 0.020, 0.030, 0.012, 0.020, 0.030, 0.500, 0.020, 0.030)
    known = Distribution(samples=samples, mean=0.1, p50=0.02, p90=0.03, p95=0.03, p99=0.5, max=0.5)
    cell = documents.cell(run=documents.settings(new=4), rounds=3, inter_token_latency_s=known)
    (chart,) = curve_charts.timelines(rows([documents.profile([cell])]))
    (line,) = elements(chart.svg, "path", "curve")
    ys = [float(pair.split()[1]) for pair in line.get("d", "")[1:].split("L")]
    # Medians 12, 20 and 30 ms on an axis that begins at 0.
    assert (BOTTOM - ys[1]) / (BOTTOM - ys[0]) == pytest.approx(20 / 12, rel=0.01)
    assert (BOTTOM - ys[2]) / (BOTTOM - ys[0]) == pytest.approx(30 / 12, rel=0.01)
    assert "the least and the most" in chart.note


def test_a_timeline_without_whole_rounds_is_not_drawn() -> None:
    known = documents.distribution(0.02, 1, 30)
    cell = documents.cell(run=documents.settings(new=32), inter_token_latency_s=known)
    assert curve_charts.timelines(rows([documents.profile([cell])])) == []


def test_long_answers_are_drawn_thinned() -> None:
    cell = documents.cell(run=documents.settings(new=2001), rounds=4)
    (chart,) = curve_charts.timelines(rows([documents.profile([cell])]))
    (line,) = elements(chart.svg, "path", "curve")
    assert line.get("d", "").count("L") < curve_charts.MOST_PLACES
    assert "median of 10 tokens" in chart.note


def test_curves_over_lengths_need_several() -> None:
    one = rows([documents.profile([documents.cell("a"), documents.cell("b")])])
    assert curve_charts.over_prompts(one) == []
    assert curve_charts.over_depths(one) == []
    rich = rows([documents.rich()])
    (prompts,), (depths,) = curve_charts.over_prompts(rich), curve_charts.over_depths(rich)
    assert [key.text for key in prompts.legend] == [
        "smollm2-135m-q4_0", "smollm2-135m-q4_k_m", "smollm2-135m-q8_0",
    ]  # fmt: skip
    assert len(depths.legend) == 2  # the third one's only deep cell failed


def test_speeds_say_which_end_is_better_and_what_is_noisy() -> None:
    (chart,) = charts.speeds(rows([documents.rich()]), DECODE)
    assert "longer is better" in chart.svg
    assert "smollm2-135m-q4_k_m p512 (noisy)" in chart.svg
    assert "44.4 tokens/s, 43.5 to 45.3" in chart.svg


def test_only_compared_artifacts_are_in_the_scatter() -> None:
    plain = documents.artifact("plain", kld_mean=None)
    found = rows([documents.profile([documents.cell("rated"), documents.cell("p", of=plain)])])
    (chart,) = charts.size_quality_speed(found)
    assert len(elements(chart.svg, "circle", "dot")) == 1
    assert charts.size_quality_speed(found[1:]) == []


def test_operators_are_the_dearest_first() -> None:
    known = documents.operators()
    shuffled = msgspec.structs.replace(known, by_kind=known.by_kind[::-1])
    found = rows([documents.profile([documents.cell(operators=shuffled)])])
    (fold,) = charts.operators(found)
    names = re.findall(r">(kind-\d+)<", fold.charts[0].svg)
    assert names == [f"kind-{n}" for n in range(10)]
    assert "8.0 % slower" in fold.note


def test_colours_follow_machines_where_there_are_several() -> None:
    found = rows([documents.rich(), documents.other_machine()])
    assert {row.machine: row.tint for row in found} == {
        "Intel Xeon Platinum 8375C": 0,
        "ARM Cortex-A76": 1,
    }
    assert len({row.tint for row in rows([documents.rich()])}) == 3


def test_memory_has_a_chart_for_each_machine() -> None:
    (one,) = charts.memory(rows([documents.rich()]))
    assert one.title == "Memory of the process"
    (peak, steady, kept) = elements(one.svg, "rect", "bar")[:3]
    assert number(steady, "width") / number(peak, "width") == pytest.approx(172 / 212, rel=0.01)
    assert number(kept, "width") / number(peak, "width") == pytest.approx(11.8 / 212, rel=0.02)
    both = charts.memory(rows([documents.rich(), documents.other_machine()]))
    assert [chart.title.split(", ")[1] for chart in both] == [
        "Intel Xeon Platinum 8375C", "ARM Cortex-A76",
    ]  # fmt: skip
