"""Keys and values of prompts that were computed before, for all sessions of a model.

A prompt is cut into blocks of tokens, and each block has a hash of itself and all before it: two
prompts share what their hashes share (as in vLLM's automatic prefix caching). What a prompt shares
with one that was kept is restored instead of computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np

from edgellm.errors import UsageError
from edgellm.runtimes.session import KvState, Session
from edgellm.runtimes.token_prefix import shared_length

BLOCK_TOKENS = 32
"""Tokens that are shared or not as one."""

DEFAULT_BUDGET_BYTES = 1 << 30

Key = bytes


class PrefixCache:
    """Prompts' keys and values in at most ``budget_bytes`` of memory; the least used go first.

    One may serve several sessions, also of different models: ``owner`` says whose keys and values
    are alike (the model, its runtime and adapters). ``hits`` counts prompts that found something.
    """

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        """Raises ``UsageError`` for a budget below 1."""
        if budget_bytes < 1:
            raise UsageError(f"a prefix cache of {budget_bytes} bytes: choose 1 or more")
        self.budget_bytes = budget_bytes
        self.hits = 0
        self._lock = Lock()
        self._states: OrderedDict[Key, tuple[tuple[Key, ...], KvState]] = OrderedDict()
        """What was kept by the hash of its last block, with the hashes of all; least used first."""
        self._lasts: dict[Key, Key] = {}
        """Of every block's hash, the last one of something kept that begins with it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(_nbytes(state) for _, state in self._states.values())

    def reuse(self, session: Session, tokens: Sequence[int], owner: str) -> int:
        """Bring ``session`` to the longest known beginning of ``tokens``; its number of tokens.

        At least one token is left to compute, because its logits are needed. A session that shares
        more already stays as it is.
        """
        from edgellm.generate import reuse_prefix

        with self._lock:
            known = self._longest(tokens, owner)
            if known is None or known[0] <= shared_length(session.tokens, tokens):
                return reuse_prefix(session, tokens)
            length, state = known
            self.hits += 1
        session.restore(state)
        session.trim(min(length, len(tokens) - 1))
        return len(session.tokens)

    def keep(self, session: Session, owner: str) -> None:
        """Remember what ``session`` holds, unless all whole blocks of it are known already.

        What it goes on from need not be kept beside it, and is not.
        """
        keys = tuple(_keys(session.tokens, owner))
        with self._lock:
            if not keys or keys[-1] in self._lasts:
                return
        state = session.save()
        if _nbytes(state) > self.budget_bytes:
            return
        with self._lock:
            for key in keys:
                self._states.pop(key, None)
            self._states[keys[-1]] = keys, state
            while self.nbytes > self.budget_bytes:
                self._states.popitem(last=False)
            self._lasts = {
                key: last for last, (all_keys, _) in self._states.items() for key in all_keys
            }

    def clear(self) -> None:
        """Give all memory back."""
        with self._lock:
            self._states.clear()
            self._lasts.clear()

    def _longest(self, tokens: Sequence[int], owner: str) -> tuple[int, KvState] | None:
        found = None
        for number, key in enumerate(_keys(tokens, owner), start=1):
            last = self._lasts.get(key)
            if last is None:
                break
            found = number * BLOCK_TOKENS, last
        if found is None:
            return None
        length, last = found
        self._states.move_to_end(last)
        return length, self._states[last][1]


def _keys(tokens: Sequence[int], owner: str) -> Iterator[Key]:
    """The hash of each whole block, those before it counted in."""
    digest = hashlib.sha256(owner.encode())
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        digest.update(np.asarray(tokens[start : start + BLOCK_TOKENS], np.int64).tobytes())
        yield digest.digest()


def _nbytes(state: KvState) -> int:
    return sum(array.nbytes for array in state.data)
