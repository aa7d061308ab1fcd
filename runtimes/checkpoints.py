"""States of a text that were kept at some lengths of it, so that a session can go back.

Keys and values lie token by token, and to forget the last is to make a list shorter. A state (of a
short convolution, of a scan) is of all tokens up to one, and those before it cannot be had from it.
To go back, a state that was kept further up is put back, and the tokens between are computed anew,
in one step with those that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import GenerationError

State = npt.NDArray[Any]

EVERY_TOKENS = 64
"""How far apart states are kept while tokens come one by one."""

MOST_BEHIND = 16
"""Tokens that are computed anew in one step with others; more have one of their own, whose end is
kept, so that guesses that fail again and again do not go back ever further."""

MOST_STATES = 32
BUDGET_BYTES = 256 << 20
"""No more states are kept, nor, beyond two, more bytes of them."""


def steps_of(behind: int, count: int, size: int) -> list[range]:
    """Steps of at most ``size`` through ``count`` tokens, of which ``behind`` are computed anew."""
    apart = behind if behind > MOST_BEHIND else 0
    return [
        range(first, min(first + size, last))
        for start, last in ((0, apart), (apart, count))
        for first in range(start, last, size)
    ]


class Checkpoints:
    """States by the number of tokens that they are of; ``back_to`` finds the nearest.

    The further back, the sparser: where there are too many, the one goes whose loss leaves the
    smallest gap by its distance from the end.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._states: list[State] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the states that are kept."""
        return sum(state.nbytes for state in self._states)

    def due(self, length: int) -> bool:
        """Whether the last state that is kept is ``EVERY_TOKENS`` or more behind ``length``."""
        return length - (self._lengths[-1] if self._lengths else 0) >= EVERY_TOKENS

    def keep(self, length: int, state: State) -> None:
        """Remember ``state``, a copy, of the first ``length`` tokens; later ones are forgotten."""
        self.back_to(length - 1)
        self._lengths.append(length)
        self._states.append(state)
        most = min(MOST_STATES, max(2, BUDGET_BYTES // max(1, state.nbytes)))
        while len(self._lengths) > most:
            place = self._least_needed() if most > 2 else 0
            del self._lengths[place], self._states[place]

    def back_to(self, length: int) -> tuple[int, State | None]:
        """The longest state of no more than ``length`` tokens, with its length; 0 where none is.

        Longer ones are forgotten.
        """
        while self._lengths and self._lengths[-1] > length:
            del self._lengths[-1], self._states[-1]
        return (self._lengths[-1], self._states[-1]) if self._lengths else (0, None)

    def copies(self) -> tuple[npt.NDArray[np.uint32], State]:
        """All lengths, and all states in one array ``[lengths, ...]``, for ``take``."""
        return np.array(self._lengths, np.uint32), np.array(self._states)

    def take(self, copies: Sequence[State]) -> None:
        """Keep what ``copies`` gave instead.

        Raises ``GenerationError`` for what it cannot have given.
        """
        lengths, states = copies
        ordered = lengths.ndim == 1 and bool((np.diff(lengths.astype(np.int64)) > 0).all())
        if not ordered or len(lengths) != len(states):
            raise GenerationError("the states of this cache are damaged: start anew")
        self._lengths, self._states = lengths.tolist(), [state.copy() for state in states]

    def _least_needed(self) -> int:
        """The place of the state whose loss costs the least, neither the first nor the last."""
        lengths, end = self._lengths, self._lengths[-1]
        return min(
            range(1, len(lengths) - 1),
            key=lambda at: (lengths[at + 1] - lengths[at - 1]) / (end - lengths[at]),
        )
