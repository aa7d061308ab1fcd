"""Charts of curves: latency token by token, and speed over the lengths of prompt and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgellm.profiling.document import Figure
from edgellm.report.charts import Chart, Key, marked
from edgellm.report.line_charts import Curve, Place, curves
from edgellm.report.quantities import DECODE, ENCODE, PREFILL, TEXT_TOKENS, TEXTS, Quantity
from edgellm.report.rows import Row
from edgellm.report.summary import FEWEST_ROUNDS, what_intervals_are
from edgellm.report.svg import DASHES, TINTS, line_sign
from edgellm.report.wording import interval, seconds_unit

MOST_CURVES = 6
"""So many curves with bands are told apart in one chart; more are drawn in further charts."""

MOST_PLACES = 200
"""Of a curve over token numbers; a longer one is drawn by medians of neighbours."""


def timelines(found: Sequence[Row]) -> list[Chart]:
    """Latency against the number of the token; a chart for each lengths, and few curves in each."""
    groups: dict[tuple[int, int, int], list[Row]] = {}
    for row in found:
        if _per_round(row) is not None:
            groups.setdefault(row.lengths, []).append(row)
    charts = []
    for (prompt, new, depth), group in groups.items():
        alike = [row.series for row in group]
        named = {
            row.label: row.series if alike.count(row.series) == 1 else row.label for row in group
        }
        title = "Latency token by token"
        if len(groups) > 1:
            title += f", prompt {prompt}" + (f", depth {depth}" if depth else "")
        for first in range(0, len(group), MOST_CURVES):
            charts.append(_timeline(title, new, group[first : first + MOST_CURVES], named))
    return charts


def over_prompts(found: Sequence[Row]) -> list[Chart]:
    """Prefill speed against the prompt's length, where there are several."""
    return _over(
        "prompt tokens",
        PREFILL,
        found,
        lambda row: (row.lengths[0], row.lengths[2]),
        against="prompt",
        kept="depth",
    )


def over_depths(found: Sequence[Row]) -> list[Chart]:
    """Decode speed against what lies in the cache before, where there are several depths."""
    return _over(
        "tokens in the cache before the prompt",
        DECODE,
        found,
        lambda row: (row.lengths[2], row.lengths[0]),
        against="depth",
        kept="prompt",
    )


def over_texts(found: Sequence[Row]) -> list[Chart]:
    """What encoders take against the length of texts, and against how many there are at a time."""
    return [
        *_over(
            "tokens of a text",
            ENCODE,
            found,
            lambda row: (row.lengths[0], row.cell.settings.batch),
            against="length",
            kept="batch",
        ),
        *_over(
            "tokens of a text",
            TEXT_TOKENS,
            found,
            lambda row: (row.lengths[0], row.cell.settings.batch),
            against="length",
            kept="batch",
        ),
        *_over(
            "texts at a time",
            TEXTS,
            found,
            lambda row: (row.cell.settings.batch, row.lengths[0]),
            against="batch",
            kept="length",
        ),
    ]


def _timeline(title: str, new: int, group: Sequence[Row], named: dict[str, str]) -> Chart:
    rounds = {row.label: found for row in group if (found := _per_round(row)) is not None}
    medians = {label: np.median(found, axis=0) for label, found in rounds.items()}
    unit, scale = seconds_unit(float(np.max(each)) for each in medians.values())
    bundle = -(-(new - 1) // MOST_PLACES)
    quartiles = all(len(found) >= FEWEST_ROUNDS for found in rounds.values())
    ends = (25.0, 75.0) if quartiles else (0.0, 100.0)
    drawn, highest = [], 0.0
    for row in group:
        samples = rounds[row.label]
        low, high = np.percentile(samples, ends, axis=0)
        marks = []
        for first in range(0, samples.shape[1], bundle):
            part = slice(first, first + bundle)
            marks.append(
                Place(
                    # The first sample is the time to the second token.
                    x=first + 2 + (min(bundle, samples.shape[1] - first) - 1) / 2,
                    y=float(np.median(medians[row.label][part])) * scale,
                    low=float(np.median(low[part])) * scale,
                    high=float(np.median(high[part])) * scale,
                )
            )
        # One stall must not flatten all the rest: it is cut off, and the boxes tell of it.
        highest = max(highest, float(np.percentile([mark.high for mark in marks], 98)) * 1.15)
        drawn.append(Curve(named[row.label], tuple(marks), row.tint, row.dash, band=True))
    looks = [(curve.tint % TINTS, curve.dash % DASHES) for curve in drawn]
    if len(set(looks)) < len(looks):
        drawn = [
            Curve(curve.label, curve.places, number, 0, band=True)
            for number, curve in enumerate(drawn)
        ]
    note = "Line: median of the rounds. Band: " + (
        "the middle half of them." if quartiles else "the least and the most."
    )
    if bundle > 1:
        note += f" Each point: the median of {bundle} tokens."
    svg = curves(title, "number of the token", f"{unit} a token", drawn, top=highest)
    return Chart(title, svg, _legend(drawn), note)


def _over(
    across: str,
    quantity: Quantity,
    found: Sequence[Row],
    key: Callable[[Row], tuple[int, int]],
    *,
    against: str,
    kept: str,
) -> list[Chart]:
    """``quantity`` over the first number that ``key`` gives; its second one stays the same.

    ``against`` and ``kept`` are what people call them.
    """
    groups: dict[tuple[str, int], dict[int, tuple[Row, Figure]]] = {}
    for row in found:
        figure = quantity.of(row.cell)
        if figure:
            length, other = key(row)
            groups.setdefault((row.series, other), {}).setdefault(length, (row, figure))
    groups = {name: each for name, each in groups.items() if len(each) > 1}
    others = {other for _, other in groups}
    unit, scale = quantity.unit, 1.0
    if unit == "s":
        figures = (figure for each in groups.values() for _, figure in each.values())
        unit, scale = seconds_unit(figure.median for figure in figures)
    drawn = []
    for (series, other), by_length in groups.items():
        marks = []
        for length, (row, figure) in sorted(by_length.items()):
            median, span = interval(figure, scale)
            hint = f"{marked(row)}: {median} {unit}, {span}"
            middle, low, high = (each * scale for each in (figure.median, figure.low, figure.high))
            marks.append(Place(length, middle, low, high, hint))
        row = next(iter(by_length.values()))[0]
        name = f"{series}, {kept} {other}" if len(others) > 1 else series
        dash = row.dash + sorted(others).index(other)
        drawn.append(Curve(name, tuple(marks), row.tint, dash))
    if not drawn:
        return []
    title = f"{quantity.words.capitalize()} against {against}"
    note = f"Whiskers: {what_intervals_are(found)}."
    svg = curves(title, across, unit, drawn)
    return [Chart(title, svg, _legend(drawn), note)]


def _per_round(row: Row) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """Latencies ``[rounds, tokens]``; None where the samples do not make whole rounds."""
    known = row.cell.inter_token_latency_s
    tokens = row.lengths[1] - 1
    if known is None or tokens < 2 or not known.samples or len(known.samples) % tokens:
        return None
    return np.asarray(known.samples, dtype=np.float64).reshape(-1, tokens)


def _legend(drawn: Sequence[Curve]) -> tuple[Key, ...]:
    return tuple(
        Key(line_sign(curve.tint, curve.dash, marked=not curve.band), curve.label)
        for curve in drawn
    )
