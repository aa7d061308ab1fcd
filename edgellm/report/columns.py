"""The table of cells: which columns it has, and what stands in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgellm.profiling.document import Distribution, Profile
from edgellm.report.quantities import (
    DECODE,
    ENCODE,
    END_TO_END,
    FIRST_TOKEN,
    LOAD,
    PREFILL,
    SPREADS,
    TEXT_TOKENS,
    TEXTS,
    Quantity,
    words_of,
)
from edgellm.report.rows import Row, machine_names, several_machines
from edgellm.report.wording import interval, number, places, plain, seconds_unit, size


@dataclass(frozen=True, slots=True)
class Shown:
    """A table's cell: its ``text``, and ``more`` in smaller type, such as an interval."""

    text: str = ""
    more: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """``title`` with ``unit``; one text for each row. ``figures``: aligned as numbers are."""

    title: str
    unit: str
    shown: tuple[Shown, ...]
    figures: bool = True

    @property
    def name(self) -> str:
        """Title and unit in one line."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def columns(found: Sequence[Row]) -> list[Column]:
    """The columns that have anything to show, the cell's name first."""
    made = [Column("cell", "", tuple(Shown(row.name) for row in found), figures=False)]
    if several_machines(found):
        machines = tuple(Shown(row.machine) for row in found)
        made.append(Column("machine", "", machines, figures=False))
    made += [
        _lengths(found),
        *(_figure(found, each) for each in (ENCODE, FIRST_TOKEN, PREFILL, DECODE)),
        *(_figure(found, each) for each in (TEXTS, TEXT_TOKENS)),
        *(_spread(found, field) for field in SPREADS),
        _bytes(found, "memory", "peak", lambda row: getattr(row.cell.memory, "peak_bytes", None)),
        _bytes(found, "size", "files", lambda row: row.cell.artifact.size_bytes),
        Column(
            "KL",
            "nats",
            tuple(
                Shown("" if (kld := row.cell.artifact.kld_mean) is None else number(kld))
                for row in found
            ),
        ),
        *(_figure(found, each) for each in (END_TO_END, LOAD)),
        _bytes(found, "keys, values", "", lambda row: getattr(row.cell.memory, "kv_bytes", None)),
        _energy(found),
        Column("rounds", "", tuple(Shown(str(row.cell.rounds or "")) for row in found)),
    ]
    return [column for column in made if any(each.text for each in column.shown)]


def ratio_rows(profiles: Sequence[Profile]) -> list[tuple[str, str, str, str, str, str, str]]:
    """For each ratio: machine, quantity, of, to, median, interval, verdict."""
    names = machine_names(profiles)
    return [
        (
            machine,
            plain(words_of(each.quantity)),
            plain(each.of),
            plain(each.to),
            *interval(each.ratio),
            plain(each.verdict),
        )
        for profile, machine in zip(profiles, names, strict=True)
        for each in profile.ratios
    ]


def _lengths(found: Sequence[Row]) -> Column:
    deep = any(row.lengths[2] for row in found)
    shown = []
    for row in found:
        prompt, new, depth = row.lengths
        text = f"{depth} + {prompt} → {new}" if deep else f"{prompt} → {new}"
        shown.append(Shown(f"{row.cell.settings.batch} × {prompt}" if row.reads else text))
    unit = "cached + prompt → new" if deep else "prompt → new"
    if any(row.reads for row in found):
        unit = "texts × length" + f", or {unit}" * (not all(row.reads for row in found))
    return Column("tokens", unit, tuple(shown))


def _figure(found: Sequence[Row], quantity: Quantity) -> Column:
    figures = [quantity.of(row.cell) for row in found]
    unit, scale = quantity.unit, 1.0
    if unit == "s":
        unit, scale = seconds_unit(figure.median for figure in figures if figure)
    shown = tuple(Shown(*interval(figure, scale)) if figure else Shown() for figure in figures)
    return Column(quantity.words, unit, shown)


def _spread(found: Sequence[Row], field: str) -> Column:
    known: list[Distribution | None] = [getattr(row.cell, field) for row in found]
    unit, scale = seconds_unit(each.p99 for each in known if each)
    shown = []
    for each in known:
        if each is None:
            shown.append(Shown())
            continue
        digits = places(each.p50 * scale)
        shown.append(
            Shown(number(each.p50 * scale, digits), f"99 %: {number(each.p99 * scale, digits)}")
        )
    return Column(SPREADS[field], unit, tuple(shown))


def _bytes(found: Sequence[Row], title: str, unit: str, of: Callable[[Row], int | None]) -> Column:
    shown = tuple(Shown("" if (each := of(row)) is None else size(each)) for row in found)
    return Column(title, unit, shown)


def _energy(found: Sequence[Row]) -> Column:
    shown = tuple(
        Shown(*interval(row.cell.energy.decode_j_per_token)) if row.cell.energy else Shown()
        for row in found
    )
    return Column("energy", "J a token", shown)
