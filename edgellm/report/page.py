"""One HTML page of profiles: it fetches nothing, and is read without script too."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from edgellm.profiling.document import Cell, Profile
from edgellm.report import charts, curve_charts
from edgellm.report.charts import Chart, Fold
from edgellm.report.columns import columns, ratio_rows
from edgellm.report.conditions import conditions, method
from edgellm.report.quantities import DECODE, ENCODE, FIRST_TOKEN, SPREADS, TEXTS
from edgellm.report.rows import Row, machine_names, rows, several_machines
from edgellm.report.summary import summary, what_intervals_are
from edgellm.report.wording import count, listed, moment, plain, seconds

if TYPE_CHECKING:
    import jinja2

UNSAFE_IN_SCRIPT = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}
"""Written so inside JSON, they cannot end the element that holds it, and mean the same."""

MOST_RAW_BYTES = 1_500_000
"""Of all profiles' JSON in a page. Latencies make most of it, and leave first."""

SHOWN = (DECODE, FIRST_TOKEN, ENCODE, TEXTS)
"""Figures that have bars right below the table."""

MOST_NAMES = 3
"""So many artifacts are named in the title."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. ``missing``: why there is nothing in it."""

    anchor: str
    title: str
    charts: tuple[Chart, ...] = ()
    folds: tuple[Fold, ...] = ()
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Raw:
    """A profile's JSON for the page, and what it is called when somebody keeps it.

    ``whole``: with every sample.
    """

    name: str
    label: str
    json: str
    whole: bool = True


def html(profiles: Sequence[Profile]) -> str:
    """The page; of profiles from several machines it compares these."""
    found = rows(profiles)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=_title(found),
        subtitle=_subtitle(profiles, found),
        sentences=summary(profiles),
        rows=found,
        columns=columns(found),
        speeds=[chart for each in SHOWN for chart in charts.speeds(found, each)],
        intervals=what_intervals_are(found),
        sections=_sections(found),
        ratios=ratio_rows(profiles),
        ratio_charts=charts.ratios(profiles),
        several=several_machines(found),
        headings=_headings(profiles),
        conditions=conditions(profiles),
        method=method(profiles),
        raw=_raw(profiles),
        style=_asset("page.css"),
        script=script,
        script_digest=digest,
    )


def _title(found: Sequence[Row]) -> str:
    names = list(dict.fromkeys(plain(row.cell.artifact.name) or "unnamed" for row in found))
    if not names:
        return "Nothing was measured"
    return listed(names) if len(names) <= MOST_NAMES else count(len(names), "artifact")


def _subtitle(profiles: Sequence[Profile], found: Sequence[Row]) -> list[str]:
    """When, where, and how much."""
    machines = list(dict.fromkeys(machine_names(profiles)))
    when = [moment(profile.started) for profile in profiles]
    failed = sum(bool(row.cell.failure) for row in found)
    cells = count(len(found), "cell") + (f", {failed} failed" if failed else "")
    took = seconds(sum(profile.seconds for profile in profiles))
    return [
        f"Measured {listed(list(dict.fromkeys(when)))}",
        f"on {listed(machines)}",
        f"{cells}, {took} of measuring",
    ]


def _sections(found: Sequence[Row]) -> list[Section]:
    """The charts in their order; those without data say why, or are left out.

    What encoders do not have is left out where there are no other cells.
    """
    writes = not found or any(not row.reads for row in found)
    lengths = [
        *curve_charts.over_prompts(found),
        *curve_charts.over_depths(found),
        *curve_charts.over_texts(found),
    ]
    sections = [
        _section(
            "latency",
            "Latency",
            [*charts.latencies(found), *curve_charts.timelines(found)],
            "No cell wrote more than one token.",
        ),
        _section(
            "lengths",
            "Prompt length and depth",
            lengths,
            "All cells have one prompt length and one depth.",
        ),
        _section(
            "quality",
            "Size, quality and memory",
            [*charts.size_quality_speed(found), *charts.memory(found)],
            "Neither memory nor divergence from a source is known.",
        ),
        _section(
            "roofline",
            "How near the machine's best",
            charts.rooflines(found),
            _no_rooflines(found),
        ),
    ]
    if not writes:
        sections.pop()
        return [each for each in sections if each.charts]
    folds = charts.operators(found)
    sections.append(
        Section("operators", "Where a token's time goes", (), tuple(folds), _no_operators(found))
    )
    return [each for each in sections if each.charts or each.folds or each.missing]


def _section(anchor: str, title: str, drawn: Sequence[Chart], missing: str) -> Section:
    return Section(anchor, title, tuple(drawn), (), "" if drawn else missing)


def _no_rooflines(found: Sequence[Row]) -> str:
    reasons = dict.fromkeys(row.cell.absent.get("roofline", "") for row in found)
    if found and all(reasons):
        return f"There is none: {listed([plain(reason) for reason in reasons])}."
    return "The artifacts do not say what a token reads, or the machine's best is not known."


def _no_operators(found: Sequence[Row]) -> str:
    """Why cells that ran have no operators, each reason once."""
    without: dict[str, list[str]] = {}
    for row in found:
        known = row.cell.operators
        if row.cell.failure or (known and known.by_kind):
            continue
        why = known.reason if known else row.cell.absent.get("operators", "")
        reason = plain(why).rstrip(".") if why else "not asked for"
        without.setdefault(reason, []).append(row.label)
    if len(without) == 1 and "not asked for" in without:
        everywhere = not any(row.cell.operators for row in found)
        if everywhere:
            return "Operators were not watched."
    return " ".join(f"No times for {listed(names)}: {reason}." for reason, names in without.items())


def _headings(profiles: Sequence[Profile]) -> list[str]:
    """What tells the profiles apart in a table that has a column for each."""
    names = machine_names(profiles)
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}, {moment(profile.started)}" for name, profile in zip(names, profiles, strict=True)
    ]


def _raw(profiles: Sequence[Profile]) -> list[Raw]:
    headings = _headings(profiles)
    whole = sum(len(msgspec.json.encode(profile)) for profile in profiles) <= MOST_RAW_BYTES
    return [
        Raw(
            name=f"profile-{number}.json" if len(profiles) > 1 else "profile.json",
            label=heading,
            json=msgspec.json.encode(profile if whole else _without_latencies(profile))
            .decode()
            .translate(UNSAFE_IN_SCRIPT),
            whole=whole,
        )
        for number, (profile, heading) in enumerate(zip(profiles, headings, strict=True), 1)
    ]


def _without_latencies(profile: Profile) -> Profile:
    """``profile`` with percentiles of latencies alone, not every sample."""
    replace = msgspec.structs.replace

    def thinned(cell: Cell) -> Cell:
        known = {field: getattr(cell, field) for field in SPREADS}
        return replace(
            cell, **{field: each and replace(each, samples=()) for field, each in known.items()}
        )

    return replace(profile, cells=tuple(map(thinned, profile.cells)))


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html.jinja"))


@cache
def _asset(name: str) -> str:
    return files("edgellm.report").joinpath(name).read_text(encoding="utf-8")
