"""Reports made of profiles: a page, Markdown, a table, gauges; one for each suffix of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from edgellm import registry
from edgellm.errors import OutputError, UsageError
from edgellm.profiling.document import Profile
from edgellm.writing_places import check_file_place

WRITERS = {
    "html": "edgellm.report.page:html",
    "md": "edgellm.report.markdown:markdown",
    "json": "edgellm.report.raw:json_text",
    "csv": "edgellm.report.table_rows:csv_text",
    "prom": "edgellm.report.prometheus:prometheus",
}
"""By suffix, what turns profiles into the file's text."""


def write_report(profiles: Sequence[Profile], path: Path) -> None:
    """Write the report that ``path``'s suffix names, whole or not at all; a file there is replaced.

    Raises what ``check_output`` does, and ``OutputError`` where writing fails.
    """
    check_output(path, len(profiles))
    text = report_text(profiles, _kind(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_text(text, encoding="utf-8", newline="")
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another place, or make room"
        ) from error


def report_text(profiles: Sequence[Profile], kind: str) -> str:
    """The report of that ``kind``, a key of ``WRITERS``."""
    text: str = registry.attribute(WRITERS[kind])(profiles)
    return text


def check_output(path: Path, profiles: int = 1) -> None:
    """Raise what ``write_report`` of so many profiles would, as far as it shows beforehand.

    ``UsageError`` for a suffix that nothing is written by, ``OutputError`` for a place that cannot
    be written.
    """
    if _kind(path) not in WRITERS:
        raise UsageError(
            f"{path}: a report is written by its file's suffix, and "
            f"{path.suffix or 'a name without one'} is none of "
            f"{', '.join(f'.{kind}' for kind in WRITERS)}: name the file by one of these"
        )
    if _kind(path) == "json":
        from edgellm.report.raw import check_single

        check_single(profiles)
    check_file_place(path)


def _kind(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")
