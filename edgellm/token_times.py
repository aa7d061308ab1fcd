"""The clock of an answer: one, and the same for `run --stats` and for profiles."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

clock = time.perf_counter
"""Seconds, of the finest clock that only goes forward."""


@dataclass(slots=True)
class TokenTimes:
    """What an answer took, in seconds, without the time that whoever reads its text takes.

    ``first_token_s``: until the first token's text (or until it was chosen, where it ends the
    answer), from when the answer was asked for. ``prefill_s``: until the first token was chosen,
    from when its prompt had been tokenized. ``latencies_s``: of every further token, from the text
    of the one before to its own; an end token's until it was chosen. They include ``sampling_s``
    (choosing; the first token's stands first) and ``text_s`` (ids to text; likewise).
    """

    asked_s: float
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    sampling_s: list[float] = field(default_factory=list)
    text_s: list[float] = field(default_factory=list)
    _mark_s: float = 0.0
    """When the last of the events below ended."""
    _token_s: float = 0.0
    """When the time of the token at hand began."""

    def begin(self) -> None:
        """The prompt is tokens now."""
        self._mark_s = self._token_s = clock()

    def computed(self) -> None:
        """The logits are there."""
        self._lap()

    def chosen(self, *, ends: bool) -> None:
        """A token was chosen, which ``ends`` the answer or has a text."""
        self.sampling_s.append(self._lap())
        if len(self.sampling_s) == 1:
            self.prefill_s = self._mark_s - self._token_s
        if ends:
            self._whole()

    def said(self) -> None:
        """The token's text is there."""
        self.text_s.append(self._lap())
        self._whole()

    def resumed(self) -> None:
        """Whoever reads has taken the text, and wants more."""
        self._mark_s = self._token_s = clock()

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed of all tokens but the first; None where there was no other."""
        return len(self.latencies_s) / sum(self.latencies_s) if self.latencies_s else None

    def _lap(self) -> float:
        now = clock()
        took = now - self._mark_s
        self._mark_s = now
        return took

    def _whole(self) -> None:
        if len(self.sampling_s) == 1:
            self.first_token_s = self._mark_s - self.asked_s
        else:
            self.latencies_s.append(self._mark_s - self._token_s)
        self._token_s = self._mark_s
