"""A runtime without a model: logits are a fixed function of the tokens so far.

It shows what happens around a model (text, stopping, caches, errors) without one, and is chosen by
name only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.errors import UnsupportedTarget
from edgellm.hardware import Hardware
from edgellm.manifest import Artifact
from edgellm.runtimes import limits
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions

TRAINED_CONTEXT = 8192
VOCAB_SIZE = 256
BYTES_PER_TOKEN = 8

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: multiplying by it spreads the bits (Knuth, TAOCP 3, 6.4)."""


class FakeRuntime:
    """Opens anything and answers the same every time."""

    name = "fake"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        return Capabilities(
            runtime=self.name,
            available=True,
            reason="computes no model: for trying things out",
            version="1",
            containers=frozenset({"gguf", "onnx"}),
            devices=("cpu",),
            kv_dtypes=("f32",),
            automatic=False,
        )

    def open(self, artifact: Artifact, options: RunOptions) -> FakeSession:
        """A session with the vocabulary of ``artifact``, or 256 tokens for a plain file."""
        if options.device not in ("auto", "cpu"):
            raise UnsupportedTarget(f"the fake runtime has no {options.device}: try --device cpu")
        facts = artifact.manifest.artifact.model if artifact.manifest else None
        trained = facts.context_length if facts else TRAINED_CONTEXT
        room = limits.context_tokens(options.context_tokens, trained, artifact.path)
        return FakeSession(facts.vocab_size if facts else VOCAB_SIZE, room)


class FakeSession:
    """Logits in [-8, 8) that depend on every token in the cache and its place."""

    runtime = "fake"
    device = "cpu"
    kv_dtype = "f32"

    def __init__(self, vocab_size: int, context_tokens: int) -> None:
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self._tokens: list[int] = []
        self._states: list[np.uint64] = []
        self._mix = np.arange(1, vocab_size + 1, dtype=np.uint64) * MULTIPLIER
        self._open = True

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self._check_open()
        limits.check_tokens(token_ids, len(self._tokens), self.context_tokens, self.vocab_size)
        rows, start = [], len(self._tokens)
        try:
            for token in token_ids:
                self._append(token)
                if all_logits:
                    rows.append(self._logits())
        except BaseException:  # Ctrl-C: keep none of them
            self.trim(start)
            raise
        return np.array(rows) if all_logits else self._logits()[np.newaxis]

    def decode(self, token_id: int) -> Logits:
        return self.prefill((token_id,)).reshape(self.vocab_size)

    def trim(self, length: int) -> None:
        self._check_open()
        limits.check_trim(length, len(self._tokens))
        del self._tokens[length:], self._states[length:]

    def save(self) -> KvState:
        self._check_open()
        return KvState(self.runtime, tuple(self._tokens), (np.array(self._states, np.uint64),))

    def restore(self, state: KvState) -> None:
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens)
        self._tokens, self._states = list(state.tokens), list(state.data[0])

    def kv_bytes(self) -> int:
        self._check_open()
        return BYTES_PER_TOKEN * self.context_tokens

    def close(self) -> None:
        self._open = False
        self._tokens, self._states = [], []

    def _check_open(self) -> None:
        if not self._open:
            raise limits.closed()

    def _append(self, token: int) -> None:
        before = int(self._states[-1]) if self._states else 0
        self._tokens.append(token)
        self._states.append(np.uint64((before * 0x100000001B3 + token + 1) % (1 << 64)))

    def _logits(self) -> Logits:
        spread = ((self._mix ^ self._states[-1]) * MULTIPLIER) >> np.uint64(40)
        logits: Logits = spread.astype(np.float32) / np.float32(1 << 20) - np.float32(8)
        return logits
