"""Notes on how files came here in one run: shown and measured, but no part of what was made."""

from __future__ import annotations

from collections.abc import Iterable

NOT_ASKED = "the Hub was not asked for a newer "


def from_cache(repo: str) -> str:
    """The note that ``repo`` was taken from the cache without asking the Hub."""
    return f"{NOT_ASKED}{repo}: taken from the cache"


def lasting(notes: Iterable[str]) -> tuple[str, ...]:
    """Those of ``notes`` that hold however the files came here; a manifest's digest covers them."""
    return tuple(note for note in notes if not note.startswith(NOT_ASKED))


def run_notes(notes: Iterable[str]) -> dict[str, list[str]]:
    """The others, for a manifest's ``measured`` part; empty where there are none."""
    found = [note for note in notes if note.startswith(NOT_ASKED)]
    return {"notes": found} if found else {}
