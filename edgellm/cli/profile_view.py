"""A profile as it is measured: a table that fills on a terminal, a line a round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgellm.cli import render

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm.profiling.measuring import Step, Watch


STAGES = {"load": "loading", "measure": "measuring", "operators": "watching"}
"""What a cell is at, in people's words."""


@contextmanager
def watched(*, quiet: bool = False) -> Iterator[Watch]:
    """A ``Watch`` that shows what it hears on stderr until the block ends."""
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _table() as watch:
            yield watch
    else:
        yield _lines()


@contextmanager
def _table() -> Iterator[Watch]:
    from rich.console import Console
    from rich.live import Live

    rows: dict[str, tuple[str, str]] = {}
    # Drawn when there is something new only: drawing takes time of the CPUs that are measured.
    console = Console(file=sys.stderr)
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def watch(step: Step) -> None:
            rows.setdefault(step.cell, ("", ""))
            if step.last_cell:
                rows[step.last_cell] = _figures(step)
            live.update(_drawn(step, rows), refresh=True)

        yield watch


def _drawn(step: Step, rows: dict[str, tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_where(step), title_justify="left", box=None, pad_edge=False)
    table.add_column("cell")
    reads = step.texts_per_s is not None
    table.add_column("batch" if reads else "first token", justify="right")
    table.add_column("texts" if reads else "decode", justify="right")
    table.add_column("")
    for name, figures in rows.items():
        now = STAGES[step.stage]
        table.add_row(Text(name), *figures, now if name == step.cell else "")
    return table


def _lines() -> Watch:
    seen: set[tuple[str, int]] = set()

    def watch(step: Step) -> None:
        part = (step.stage if step.stage == "operators" else "", step.round)
        if part not in seen:
            seen.add(part)
            render.say(_where(step))

    return watch


def _where(step: Step) -> str:
    if step.stage == "operators":
        return f"watching operators, cell {step.done_cells + 1} of {step.cells}"
    if step.round < 1:
        return f"warming up, {render.count(step.cells, 'cell')}"
    rounds = f" of {step.rounds}" if step.rounds else ""
    return f"round {step.round}{rounds}, cell {step.done_cells + 1} of {step.cells}"


def _figures(step: Step) -> tuple[str, str]:
    if step.texts_per_s is not None:
        return render.duration(step.latency_s or 0.0), f"{step.texts_per_s:,.1f} texts/s"
    speed = step.decode_tokens_per_s
    return (
        render.duration(step.first_token_s or 0.0),
        f"{speed:.1f} tokens/s" if speed else "-",
    )
