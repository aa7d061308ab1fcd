"""Progress on stderr: a bar with speed and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgellm.progress import Progress, ProgressEvent, Stage, unwatched

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0
"""How often a plain line is written where no bar can be drawn."""


@contextmanager
def progress_shown(*, quiet: bool = False) -> Iterator[Progress]:
    """A ``Progress`` that shows what it hears until the block ends."""
    if quiet:
        yield unwatched
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description:<9}"),
        bars.BarColumn(bar_width=None),
        bars.TextColumn("{task.fields[items]}"),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
    )
    tasks: dict[Stage, TaskID] = {}
    with bars.Progress(*columns, console=Console(file=sys.stderr), expand=True) as bar:

        def watch(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, items="")
            bar.update(
                tasks[event.stage],
                completed=event.done_bytes,
                total=event.total_bytes or None,
                items=_items(event),
            )

        yield watch


def _lines() -> Progress:
    started: dict[Stage, float] = {}
    last: dict[Stage, float] = {}

    def watch(event: ProgressEvent) -> None:
        now = time.monotonic()
        finished = 0 < event.total_bytes <= event.done_bytes
        if event.stage not in started:
            started[event.stage] = last[event.stage] = now
        if last[event.stage] == float("inf"):  # its last line is out
            return
        if not finished and now - last[event.stage] < SECONDS_BETWEEN_LINES:
            return
        last[event.stage] = float("inf") if finished else now
        print(_line(event, now - started[event.stage]), file=sys.stderr, flush=True)

    return watch


def _line(event: ProgressEvent, seconds: float) -> str:
    share = event.done_bytes / event.total_bytes if event.total_bytes else 1.0
    speed = event.done_bytes / seconds / 1e6 if seconds > 0 else 0.0
    left = seconds * (1 / share - 1) if share > 0 else 0.0
    facts = [f"{share:4.0%}", _items(event), f"{event.done_bytes / 1e6:.0f} MB"]
    if speed:
        facts.append(f"{speed:.0f} MB/s")
    facts.append(f"{left:.0f} s left" if share < 1 else f"in {seconds:.1f} s")
    return f"{event.stage:<9} " + "  ".join(fact for fact in facts if fact)


def _items(event: ProgressEvent) -> str:
    if not event.total_items:
        return ""
    return f"{event.done_items}/{event.total_items} tensors"
