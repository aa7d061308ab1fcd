"""What sessions share that compute a prompt in steps and keep the list of its tokens themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from edgellm.runtimes import limits
from edgellm.runtimes.session import Logits

STEP_TOKENS = 512
"""Tokens computed at once: bounds the memory of a long prompt. Ctrl-C is heard between steps."""


class SteppedSession(ABC):
    """The frame of a ``Session``: a backend adds a step, forgetting, and copies of its cache."""

    runtime: str
    device: str
    context_tokens: int
    vocab_size: int
    kv_dtype: str

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._closed = False

    @abstractmethod
    def _compute(self, token_ids: Sequence[int], outputs: int) -> Logits | None:
        """Append these tokens to the backend's cache; logits ``[outputs, vocab]`` of the last.

        With no ``outputs`` what comes back is not looked at. Raises ``GenerationError``.
        """

    @abstractmethod
    def _forget(self, length: int) -> None:
        """Keep the first ``length`` tokens of the cache, where a step may have been interrupted."""

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self._check_open()
        limits.check_tokens(token_ids, len(self._tokens), self.context_tokens, self.vocab_size)
        start, count = len(self._tokens), len(token_ids)
        rows = np.empty((count if all_logits else 1, self.vocab_size), np.float32)
        try:
            for first in range(0, count, STEP_TOKENS):
                step = token_ids[first : first + STEP_TOKENS]
                last = first + len(step) == count
                outputs = len(step) if all_logits else int(last)
                logits = self._compute(step, outputs)
                self._tokens.extend(step)
                if outputs:
                    rows[first if all_logits else 0 :][:outputs] = logits
        except BaseException:  # Ctrl-C as well: the cache goes back to where it was
            self._keep(start)
            raise
        return rows

    def decode(self, token_id: int) -> Logits:
        # Without the copy and the steps of a prompt: weights have pushed all else out of the caches
        # when this runs, and each line costs several times what it does in a loop of its own.
        self._check_open()
        held = len(self._tokens)
        limits.check_tokens((token_id,), held, self.context_tokens, self.vocab_size)
        try:
            logits = self._compute((token_id,), 1)
        except BaseException:
            self._keep(held)
            raise
        self._tokens.append(token_id)
        assert logits is not None
        row: Logits = logits[-1]
        return row

    def trim(self, length: int) -> None:
        self._check_open()
        limits.check_trim(length, len(self._tokens))
        self._keep(length)

    def _keep(self, length: int) -> None:
        del self._tokens[length:]
        self._forget(length)

    def _check_open(self) -> None:
        if self._closed:
            raise limits.closed()
