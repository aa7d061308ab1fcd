"""``edgellm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli import render


def report(
    profiles: Annotated[
        list[Path],
        typer.Argument(metavar="PROFILE.json...", help="What profile --output FILE.json wrote."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE.html", help="One page with charts; it fetches nothing."
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A .html, .md, .csv, .prom or .json; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make pages and tables of profiles.

    Without a file to write it prints Markdown. A report names no winner where intervals overlap or
    a side is noisy. Profiles of several machines are compared in one report.

    \b
    Examples:
      edgellm report laptop.json
      edgellm report laptop.json --html laptop.html
      edgellm report laptop.json board.json --html both.html -o both.csv
      edgellm report laptop.json -o laptop.prom
      edgellm report laptop.json --json | jq -r '.summary[].text'
    """
    from edgellm.errors import UsageError
    from edgellm.profiling.document import read_profile
    from edgellm.report import check_output, report_text, write_report
    from edgellm.report.summary import summary

    if html is not None and html.suffix.lower() != ".html":
        raise UsageError(f"--html {html}: a page's name ends in .html; --output takes other kinds")
    wanted = [*([] if html is None else [html]), *(output or [])]
    for path in wanted:
        check_output(path, len(profiles))
    read = [read_profile(path) for path in profiles]
    for path in wanted:
        write_report(read, path)
    if as_json:
        render.show_json({"summary": summary(read), "written": wanted})
    elif wanted:
        render.show_facts((each.topic, each.text) for each in summary(read))
        render.show_notes(f"written: {path}" for path in wanted)
    else:
        print(report_text(read, "md"), end="")
