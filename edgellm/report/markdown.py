"""Profiles as Markdown, for an issue or a pull request on GitHub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgellm.profiling.document import Profile
from edgellm.report.columns import Shown, columns, ratio_rows
from edgellm.report.conditions import conditions, method
from edgellm.report.rows import Row, machine_names, rows
from edgellm.report.summary import summary
from edgellm.report.wording import moment, plain

MEANT = re.compile(r"([\\`*_{}\[\]<>|~$&])")
"""Letters that GitHub would take for markup."""

CALLED = re.compile(r"([@#])(?=\w)")
"""What begins somebody's name or an issue's number; a comment behind it keeps GitHub from that."""

DEAREST = 10
"""Kinds of operators that are shown."""

DETAILED = ("Failed", "Noisy")
"""Topics of the summary that a list of their own tells of here."""


def markdown(profiles: Sequence[Profile]) -> str:
    """Summary, cells, failures and noise, ratios, conditions and method."""
    found = rows(profiles)
    shown = columns(found)
    parts = ["## edgellm profile", *(_line(profile, name) for profile, name in _each(profiles)), ""]
    parts += [
        f"- **{each.topic}:** {literal(each.text)}"
        for each in summary(profiles)
        if each.topic not in DETAILED
    ]
    marked = [
        f"- {literal(row.label)} {kind}: {literal(reason)}"
        for row in found
        for kind, reasons in (("failed", [row.cell.failure]), ("is noisy", row.cell.noisy))
        for reason in reasons
        if reason
    ]
    if marked:
        parts += ["", "### Failures and noise", "", *marked]
    if found:
        table = []
        for number, row in enumerate(found):
            texts = [_with_more(column.shown[number]) for column in shown]
            texts[0] += " (failed)" * bool(row.cell.failure) + " (noisy)" * bool(row.cell.noisy)
            table.append(texts)
        names = [each.name for each in shown]
        right = [each.figures for each in shown]
        parts += ["", "### Cells", "", *_table(names, table, right)]
    compared = ratio_rows(profiles)
    if compared:
        lines = [
            [quantity, of, to, f"{median} ({span})", verdict, machine]
            for machine, quantity, of, to, median, span, verdict in compared
        ]
        names = ["quantity", "of", "to", "ratio", "verdict", "machine"]
        parts += ["", "### Ratios", "", *_table(names, lines, [name == "ratio" for name in names])]
    watched = [row for row in found if row.cell.operators and row.cell.operators.by_kind]
    if watched:
        parts += ["", "### Where a token's time goes", ""]
        parts += [f"- {literal(row.label)}: {literal(_operators(row))}" for row in watched]
    heads = ["", *(name for _, name in _each(profiles))]
    for title, facts in (("Conditions", conditions(profiles)), ("Method", method(profiles))):
        table = [[name, *values] for name, values in facts]
        parts += ["", "<details>", f"<summary>{title}</summary>", ""]
        parts += [*_table(heads, table, [False] * len(heads)), "", "</details>"]
    return "\n".join(parts) + "\n"


def _operators(row: Row) -> str:
    """The dearest kinds of operators, and what watching them cost."""
    found = row.cell.operators
    assert found is not None
    kinds = ", ".join(f"{kind.name} {kind.share:.0%}" for kind in found.by_kind[:DEAREST])
    slower = f"; slower by {found.overhead:.0%} while watched" if found.overhead else ""
    return kinds + slower


def literal(text: str) -> str:
    """``text`` so that GitHub shows it as it is, in a table too."""
    return CALLED.sub(r"\1<!-- -->", MEANT.sub(r"\\\1", plain(text)))


def _each(profiles: Sequence[Profile]) -> list[tuple[Profile, str]]:
    return list(zip(profiles, machine_names(profiles), strict=True))


def _line(profile: Profile, machine: str) -> str:
    return (
        f"\nedgellm {literal(profile.edgellm)}, {literal(moment(profile.started))}, "
        f"on {literal(machine)}"
    )


def _with_more(shown: Shown) -> str:
    return f"{shown.text} ({shown.more})" if shown.more else shown.text


def _table(
    names: Sequence[str], lines: Iterable[Sequence[str]], right: Sequence[bool]
) -> list[str]:
    """A table; ``right``: for each column, whether its texts stand at the right."""
    return [
        _row([literal(name) for name in names]),
        _row(["--:" if each else "---" for each in right]),
        *(_row([literal(text) or "–" for text in line]) for line in lines),
    ]


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
