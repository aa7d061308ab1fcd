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
        bars.TextColumn("{task.description:<9}", markup=False),
        bars.BarColumn(bar_width=30),
        bars.TextColumn("{task.fields[facts]}", markup=False),
    )
    tasks: dict[Stage, TaskID] = {}
    started: dict[Stage, float] = {}
    with bars.Progress(*columns, console=Console(file=sys.stderr)) as bar:

        def watch(event: ProgressEvent) -> None:
            now = time.monotonic()
            if event.stage not in tasks:
                for earlier in tasks.values():
                    bar.update(earlier, total=1, completed=1)
                tasks[event.stage] = bar.add_task(event.stage, total=None, facts="")
                started[event.stage] = now
            done, total = event.done_bytes, event.total_bytes
            if not done:  # work that is counted in steps
                done, total = event.done_items, event.total_items
            bar.update(
                tasks[event.stage],
                completed=done,
                total=total if done else None,
                facts=_facts(event, now - started[event.stage]),
            )

        yield watch
        for task in tasks.values():
            bar.update(task, total=1, completed=1)


def _lines() -> Progress:
    started: dict[Stage, float] = {}
    last: dict[Stage, float] = {}
    finished: set[Stage] = set()

    def watch(event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.stage not in started:
            started[event.stage] = last[event.stage] = now
        whole = 0 < event.total_bytes <= event.done_bytes
        whole = whole or (not event.total_bytes and 0 < event.total_items <= event.done_items)
        due = whole or now - last[event.stage] >= SECONDS_BETWEEN_LINES
        if due and event.stage not in finished:
            last[event.stage] = now
            facts = _facts(event, now - started[event.stage])
            print(f"{event.stage:<9} {facts}", file=sys.stderr, flush=True)
        if whole:
            finished.add(event.stage)

    return watch


def _facts(event: ProgressEvent, seconds: float) -> str:
    """`` 40%  109/272 tensors  42 MB  120 MB/s  3 s left``; without bytes, the item and steps."""
    if not event.done_bytes:
        facts = [event.item]
        if event.total_items:
            facts.append(f"{event.done_items}/{event.total_items}")
        if event.seconds_left is not None:
            facts.append(f"{event.seconds_left:.0f} s left")
        elif 0 < event.done_items < event.total_items and seconds > 0:
            facts.append(f"{seconds * (event.total_items / event.done_items - 1):.0f} s left")
        return ", ".join(facts)
    facts = [f"{event.done_bytes / 1e6:.0f} MB"]
    if event.total_items:
        facts.insert(0, f"{event.done_items}/{event.total_items} tensors")
    if seconds > 0:
        facts.append(f"{event.done_bytes / seconds / 1e6:.0f} MB/s")
    if event.total_bytes:
        share = event.done_bytes / event.total_bytes
        facts.insert(0, f"{share:4.0%}")
        left = seconds * (1 / share - 1)
        facts.append(f"{left:.0f} s left" if share < 1 else f"in {seconds:.1f} s")
    return "  ".join(facts)
