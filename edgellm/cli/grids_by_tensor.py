"""Grids tensor by tensor on the command line: how they are named, and how a choice is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgellm.cli import render
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.budget.fitting import Fit


def tensor_grids(entries: Sequence[str] | None) -> dict[str, str] | None:
    """``NAME=GRID``, each, as a table; the last of equal names counts."""
    found = {}
    for entry in entries or ():
        name, _, grid = entry.rpartition("=")
        if not name.strip() or not grid.strip():
            raise UsageError(
                f"--tensor-grid reads NAME=GRID, such as blk.*.attn_v.weight=q6_k, and not {entry}"
            )
        found[name] = grid
    return found or None


def show_fit(fitted: Fit) -> None:
    """What each tensor was given for the size, and what that is expected to cost."""
    print()
    render.show_table(
        ("chosen for", "grid", "size", "expected KL"),
        [
            (entry.name, entry.grid, render.size(entry.nbytes), f"{entry.kl:.2g}")
            for entry in fitted.entries
        ],
        right="23",
    )
    render.show_notes(
        [
            f"measured in {render.duration(fitted.seconds)} on {fitted.text.tokens} tokens of "
            f"{fitted.text.name}; --save-recipe FILE keeps the choice, and repeats it without"
        ]
    )
