"""Which charts the figures of all cells make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.profiling.document import Distribution, Operator, Profile
from edgellm.report.line_charts import Dot, scatter
from edgellm.report.quantities import DECODE, Quantity, words_of
from edgellm.report.row_charts import Bar, BarRow, Box, bars, boxes, spans
from edgellm.report.rows import Row, machine_names
from edgellm.report.summary import compared
from edgellm.report.svg import Look, block_sign
from edgellm.report.wording import (
    count,
    interval,
    number,
    percent,
    places,
    plain,
    seconds,
    seconds_unit,
    size,
)

MOST_DOTS = 160
"""Samples of a distribution that are drawn, evenly spread over their order by size."""

DEAREST = 10
"""So many operators are drawn."""


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend: its sign, as SVG, and what that stands for."""

    svg: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its title, the legend that stands above it, and a note that stands below."""

    title: str
    svg: str
    legend: tuple[Key, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fold:
    """Charts about one cell, which a reader opens."""

    title: str
    charts: tuple[Chart, ...]
    note: str


def speeds(found: Sequence[Row], quantity: Quantity) -> list[Chart]:
    """The medians of ``quantity`` with their intervals, a bar for each cell."""
    measured = [(row, figure) for row in found if (figure := quantity.of(row.cell))]
    if not measured:
        return []
    unit, scale = quantity.unit, 1.0
    if unit == "s":
        unit, scale = seconds_unit(figure.median for _, figure in measured)
    lines = []
    for row, figure in measured:
        median, span = interval(figure, scale)
        low, high = (each * scale for each in (figure.low, figure.high))
        hint = f"{row.label}: {median} {unit}, {span}"
        bar = Bar(figure.median * scale, Look("bar", row.tint), low, high, hint)
        lines.append(BarRow(marked(row), median, (bar,)))
    better = "longer" if quantity.more else "shorter"
    title = quantity.words.capitalize()
    axis = f"{unit} ({better} is better)"
    return [Chart(title, bars(title, axis, lines), machines_legend(row for row, _ in measured))]


def latencies(found: Sequence[Row]) -> list[Chart]:
    """How the time between two tokens spreads, and that of a batch, a box for each cell."""
    return [
        *_spread(found, "inter_token_latency_s", "Time between two tokens", "a token"),
        *_spread(found, "latency_s", "Time of a batch of texts", "a batch"),
    ]


def _spread(found: Sequence[Row], field: str, title: str, of: str) -> list[Chart]:
    measured: list[tuple[Row, Distribution]] = [
        (row, each) for row in found if (each := getattr(row.cell, field))
    ]
    if not measured:
        return []
    unit, scale = seconds_unit(each.p99 for _, each in measured)
    drawn = []
    for row, each in measured:
        samples = np.sort(np.asarray(each.samples or (each.p50,), dtype=float)) * scale
        p5, p25, p75 = (float(value) for value in np.percentile(samples, (5, 25, 75)))
        strip = samples[np.unique(np.linspace(0, len(samples) - 1, MOST_DOTS).astype(int))]
        p50, p99, most = each.p50 * scale, each.p99 * scale, each.max * scale
        digits = places(p50)
        shown = " / ".join(number(value, digits) for value in (p50, p99, most))
        look = Look("box", row.tint)
        p95 = each.p95 * scale
        dots = tuple(map(float, strip)) if each.samples else ()
        drawn.append(Box(marked(row), shown, look, p5, p25, p50, p75, p95, p99, most, dots))
    note = (
        "Box: the middle half of all samples, with the median. Stem: 5th to 95th percentile. "
        "Diamond: 99th. Dots: samples. Right: median / 99th percentile / slowest."
    )
    svg = boxes(title, f"{unit} {of} (further left is better)", drawn)
    return [Chart(title, svg, machines_legend(row for row, _ in measured), note)]


def size_quality_speed(found: Sequence[Row]) -> list[Chart]:
    """Size across, KL divergence up, speed as area; cells whose artifact was compared only."""
    dots = []
    for group in compared(found):
        for row in group:
            artifact, figure = row.cell.artifact, DECODE.of(row.cell)
            if artifact.kld_mean is None or figure is None:
                continue
            speed = number(figure.median)
            hint = (
                f"{row.label}: {size(artifact.size_bytes)}, KL {number(artifact.kld_mean)} nats, "
                f"{speed} tokens/s"
            )
            dots.append(
                Dot(
                    f"{plain(artifact.name)}, {speed}/s",
                    artifact.size_bytes / 1e6,
                    artifact.kld_mean,
                    figure.median,
                    row.tint,
                    hint,
                )
            )
    if not dots:
        return []
    title = "Size, quality and speed"
    note = "The further down and left, the better; the larger the dot, the faster it decodes."
    up = "KL divergence to the source, nats"
    return [
        Chart(
            title, scatter(title, "size of all files, MB", up, dots), machines_legend(found), note
        )
    ]


def memory(found: Sequence[Row]) -> list[Chart]:
    """Peak, steady and the part of keys and values, a group of bars for each cell.

    A chart for each machine: the bars' colours say what they are.
    """
    machines = dict.fromkeys(row.machine for row in found if row.cell.memory)
    charts = []
    for machine in machines:
        title = "Memory of the process" + (f", {machine}" if len(machines) > 1 else "")
        charts.append(_memory(title, [row for row in found if row.machine == machine]))
    return charts


def rooflines(found: Sequence[Row]) -> list[Chart]:
    """Which share of the machine's best each cell reaches."""
    charts = []
    for title, axis, field in (
        ("Decoding: share of the memory bandwidth", "% of bandwidth", "decode_share"),
        ("Prefill: share of the arithmetic", "% of float32 matrix products", "prefill_share"),
    ):
        reached = [
            (row, share)
            for row in found
            if row.cell.roofline and (share := getattr(row.cell.roofline, field)) is not None
        ]
        if reached:
            lines = [
                BarRow(
                    marked(row),
                    percent(share),
                    (
                        Bar(
                            share * 100,
                            Look("bar", row.tint),
                            hint=f"{row.label}: {percent(share)}",
                        ),
                    ),
                )
                for row, share in reached
            ]
            svg = bars(title, axis, lines, reference=100.0)
            charts.append(Chart(title, svg, machines_legend(row for row, _ in reached)))
    return charts


def operators(found: Sequence[Row]) -> list[Fold]:
    """Where a token's time goes, for each cell that knows."""
    folds = []
    for row in found:
        known = row.cell.operators
        if known is None or not known.by_kind:
            continue
        parts = [("By kind of operator", known.by_kind), ("By layer", known.by_layer)]
        charts = tuple(_operators(title, each, row) for title, each in parts if each)
        watched = f"{plain(known.source)} over {count(known.tokens, 'token')}"
        slower = "" if known.overhead is None else f", {percent(known.overhead)} slower for it"
        trace = f" Trace for Perfetto: {plain(known.trace)}." if known.trace else ""
        folds.append(Fold(row.label, charts, f"Watched by {watched}{slower}.{trace}"))
    return folds


def ratios(profiles: Sequence[Profile]) -> list[Chart]:
    """Each ratio's interval about 1, a chart for each quantity."""
    names = machine_names(profiles)
    several = len(set(names)) > 1
    by_quantity: dict[str, list[BarRow]] = {}
    for profile, machine in zip(profiles, names, strict=True):
        for each in profile.ratios:
            median, span = interval(each.ratio)
            label = f"{plain(each.of)} / {plain(each.to)}" + (f" · {machine}" if several else "")
            tint = {"faster": 2, "slower": 1}.get(each.verdict, 6)
            look = Look("point", tint)
            hint = f"{label}: {median}, {span}, {each.verdict}"
            bar = Bar(each.ratio.median, look, each.ratio.low, each.ratio.high, hint)
            by_quantity.setdefault(each.quantity, []).append(BarRow(label, median, (bar,)))
    return [
        Chart(f"Ratio of {words_of(quantity)}", spans(words_of(quantity), "ratio", lines, 1.0))
        for quantity, lines in by_quantity.items()
    ]


def _memory(title: str, found: Sequence[Row]) -> Chart:
    taken = [(row, each) for row in found if (each := row.cell.memory)]
    most = max(each.peak_bytes for _, each in taken)
    unit, scale = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    kept = any(each.kv_bytes is not None for _, each in taken)
    kinds = ("peak", "steady", "keys and values")
    lines = []
    for row, each in taken:
        parts = (each.peak_bytes, each.steady_bytes, each.kv_bytes)
        drawn = tuple(
            Bar(part / scale, Look(f"bar m{kind}"), hint=f"{row.label}, {name}: {size(part)}")
            for kind, (name, part) in enumerate(zip(kinds, parts, strict=True))
            if part is not None
        )
        lines.append(BarRow(marked(row), size(each.peak_bytes), drawn))
    shown = kinds if kept else kinds[:2]
    legend = tuple(Key(block_sign(f"bar m{kind}"), name) for kind, name in enumerate(shown))
    note = "Right: the peak. File pages that the process maps are counted."
    return Chart(title, bars(title, f"{unit} (shorter is better)", lines), legend, note)


def _operators(title: str, known: Sequence[Operator], row: Row) -> Chart:
    dearest = sorted(known, key=lambda each: -each.seconds)[:DEAREST]
    unit, scale = seconds_unit(each.seconds for each in dearest)
    lines = []
    for each in dearest:
        shown = f"{seconds(each.seconds)} · {percent(each.share)}"
        hint = f"{plain(each.name)}: {seconds(each.seconds)}, {number(each.calls)} calls a token"
        bar = Bar(each.seconds * scale, Look("bar", row.tint), hint=hint)
        lines.append(BarRow(plain(each.name), shown, (bar,)))
    rest = sum(each.share for each in known) - sum(each.share for each in dearest)
    more = len(known) - len(dearest)
    note = f"Not drawn: {more} more, {percent(rest)} together." if more else ""
    return Chart(title, bars(title, f"{unit} a token", lines), (), note)


def marked(row: Row) -> str:
    """The row's name in a chart whose legend tells the machines apart."""
    return f"{row.name} (noisy)" if row.cell.noisy else row.name


def machines_legend(found: Iterable[Row]) -> tuple[Key, ...]:
    """A legend of the machines, by colour; none where there is but one."""
    tints = {row.machine: row.tint for row in found}
    if len(tints) < 2:
        return ()
    return tuple(
        Key(block_sign(str(Look("bar", tint))), machine) for machine, tint in tints.items()
    )
