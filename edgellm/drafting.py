"""Speculative decoding: several tokens guessed cheaply, and computed by the model in one step.

The tokens that are drawn are those of plain decoding: after every token the model's own logits say
what follows, by the same sampler and random numbers. Where that is the guess, the logits behind it
are known already; where not, what was computed behind it is forgotten. So no guess changes what is
drawn from given logits. The logits themselves depend a little on how many tokens are computed at
once: in the last bits with float weights, and more where kernels for several tokens round
activations otherwise (llama.cpp's of 4 bits, from 4 tokens on: SmolLM2's logits moved by up to 0.7,
with up to 3 not at all). There a greedy answer may part at a near tie, to one that is as good.

Guesses come from the text so far (prompt lookup, github.com/apoorvumang/prompt-lookup-decoding), or
from a smaller model (arXiv 2211.17192, with the draft's likeliest tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgellm.runtimes.session import Logits, Session

LOOKUP = "lookup"
"""The name of prompt lookup, where others name a model."""

MOST_GUESSED = 10
"""Tokens guessed at once, at most."""
PAUSE = 8
"""Tokens without a guess after one of a single token that failed."""

SURE = 0.6
"""A smaller model guesses on while it gives its likeliest token this probability: each guess costs
one of its steps, and behind one that fails all are lost."""

LONGEST, SHORTEST = 4, 2
"""Lengths of the end of the text that prompt lookup looks for further up."""


class Drafter(Protocol):
    """Who guesses."""

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """At most ``count`` tokens that may follow ``tokens``; none where nothing comes to mind."""

    def close(self) -> None:
        """Give memory back."""


class PromptLookup:
    """Guesses that the text goes on as it did where its last few tokens stood before."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        self._learn(tokens)
        for length in range(LONGEST, SHORTEST - 1, -1):
            if len(tokens) > length:
                place = self._last.get(tuple(tokens[-length:]))
                if place is not None:
                    return list(tokens[place : place + count])
        return ()

    def close(self) -> None:
        self._tokens, self._last = [], {}

    def _learn(self, tokens: Sequence[int]) -> None:
        """Where each run of tokens was last followed by something."""
        known = len(self._tokens)
        if known > len(tokens) or list(tokens[:known]) != self._tokens:
            self._tokens, self._last, known = [], {}, 0
        for end in range(max(known, 1), len(tokens)):
            for length in range(SHORTEST, LONGEST + 1):
                if end >= length:
                    self._last[tuple(tokens[end - length : end])] = end
        self._tokens = list(tokens)


class DraftModel:
    """Guesses the likeliest tokens of a smaller model with the same tokens, while it is sure."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        from edgellm.generate import reuse_prefix

        room = self._session.context_tokens - len(tokens)
        if room < 1:
            return ()
        kept = reuse_prefix(self._session, tokens)
        logits = self._session.prefill(tokens[kept:])[-1]
        guessed: list[int] = []
        while True:
            token = int(logits.argmax())
            if _probability(logits, token) < SURE:
                return guessed
            guessed.append(token)
            if len(guessed) == min(count, room):
                return guessed
            logits = self._session.decode(token)

    def close(self) -> None:
        self._session.close()


def _probability(logits: Logits, token: int) -> float:
    """What ``logits`` ``[vocab]`` give the likeliest ``token``, between 0 and 1."""
    return 1.0 / float(np.exp(logits - logits[token]).sum(dtype=np.float64))


class Lookahead:
    """Logits token by token, computed several at a time where guesses come true.

    ``guessed`` and ``taken``: how many tokens were, so far. Guesses grow where all of the last one
    came true, shrink where nothing did, and pause where even a single one did not.
    """

    def __init__(self, session: Session, drafter: Drafter) -> None:
        self._session, self._drafter = session, drafter
        self._guess: list[int] = []
        self._rows: Logits | None = None
        self._came_true = self._pause = 0
        self._count = MOST_GUESSED
        self.guessed = self.taken = 0

    def logits_after(self, tokens: Sequence[int], most: int) -> Logits:
        """Logits ``[vocab]`` of what follows ``tokens``, whose last was just chosen.

        ``most``: how many tokens may still be wanted behind it; a guess gives one more than it has.
        """
        token = tokens[-1]
        if self._rows is not None:
            if self._came_true < len(self._guess) and token == self._guess[self._came_true]:
                self._came_true += 1
                self.taken += 1
                row: Logits = self._rows[self._came_true]
                return row
            self._adapt()
        self.forget(len(tokens) - 1)
        self._pause -= 1
        room = min(self._session.context_tokens - len(tokens), most - 1, self._count)
        guess = list(self._drafter.draft(tokens, room)) if room > 0 and self._pause < 0 else []
        if not guess:
            return self._session.decode(token)
        self._guess, self._came_true = guess, 0
        self._rows = self._session.prefill((token, *guess), all_logits=True)
        self.guessed += len(guess)
        first: Logits = self._rows[0]
        return first

    def forget(self, length: int) -> None:
        """Leave the first ``length`` tokens in the cache, and no guess."""
        self._rows, self._guess = None, []
        if len(self._session.tokens) > length:
            self._session.trim(length)

    def _adapt(self) -> None:
        if self._came_true == len(self._guess):
            self._count = min(2 * self._count, MOST_GUESSED)
        elif self._came_true == 0:
            self._pause = PAUSE if self._count == 1 else 0
            self._count = max(1, self._count // 2)
