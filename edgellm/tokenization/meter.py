"""What one rendering of a chat template may use up: steps, characters of text, time."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgellm.errors import SourceError

MOST_STEPS = 10_000_000
"""Turns of loops (times what they write), calls and filters of one rendering."""
LONGEST = 20_000_000
"""Characters of one text, or of a list when it is written out."""
MOST_CHARACTERS = 500_000_000
"""Of all texts and lists that one rendering makes, each counted whenever one is made."""
MOST_SECONDS = 10.0
"""For what steps do not measure, like looking for something in long lists over and over."""
_ITEM = 8  # characters that an item of a list counts for


class Meter:
    """What one rendering has used up; each method raises ``SourceError`` beyond the most."""

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self._deadline = time.monotonic() + MOST_SECONDS
        # By identity; the values are kept so that no other takes their place in memory.
        self._weights: dict[int, tuple[Any, int]] = {}

    def step(self, count: int = 1) -> None:
        """Count steps."""
        self.steps += count
        if self.steps > MOST_STEPS:
            raise endless(f"more than {MOST_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise endless(f"more than {MOST_SECONDS:g} seconds")

    def text(self, characters: int) -> None:
        """Count a text that is about to be made."""
        self.characters += characters
        if characters > LONGEST:
            raise endless(f"a text of more than {LONGEST} characters")
        if self.characters > MOST_CHARACTERS:
            raise endless(f"more than {MOST_CHARACTERS} characters of text")

    def items(self, count: int) -> None:
        """Count a list that is about to be made."""
        self.text(_ITEM * count)

    def weight(self, value: Any) -> int:
        """About how many characters ``value`` is when written out.

        A list that holds another one twice weighs twice as much, and few of them make a text
        without end: those raise before anyone writes them.
        """
        if isinstance(value, str):
            return _ITEM + len(value)
        if not isinstance(value, list | tuple | dict):
            return _ITEM
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        inside = (*value, *value.values()) if isinstance(value, dict) else value
        weight = _ITEM + sum(map(self.weight, inside))
        if weight > LONGEST:
            raise endless(f"a list of more than {LONGEST} characters")
        self._weights[id(value)] = (value, weight)
        return weight


_CURRENT: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)


@contextmanager
def metered() -> Iterator[Meter]:
    """Within, what a template does is counted, from nothing."""
    meter = Meter()
    token = _CURRENT.set(meter)
    try:
        yield meter
    finally:
        _CURRENT.reset(token)


def current() -> Meter:
    """The meter of the rendering that runs; a new one where a template is only being compiled."""
    return _CURRENT.get() or Meter()


def endless(what: str) -> SourceError:
    """The error for a template that takes ``what``."""
    return SourceError(
        f"the chat template takes {what} for one conversation: it does not end, or is made to do "
        "harm. Mend the template, or use --raw to do without it"
    )
