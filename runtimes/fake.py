"""A runtime without a model: logits are a fixed function of the tokens so far.

It shows what happens around a model (text, stopping, caches, errors) without one, and is chosen by
name only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgellm.artifact import Artifact
from edgellm.errors import UnsupportedTarget
from edgellm.hardware import Hardware
from edgellm.runtimes import limits
from edgellm.runtimes.operators import OperatorEvent, TracedStep
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.stepped import SteppedSession

TRAINED_CONTEXT = 8192
VOCAB_SIZE = 256
BYTES_PER_TOKEN = 8

LAYERS = 2
PARTS = {"Product": 0.75, "Attention": 0.25}
"""Kinds of operator that a traced session makes up for each layer, and their shares of its time."""

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
            traces_operators=True,
            tracing="made up",
        )

    def open(self, artifact: Artifact, options: RunOptions) -> FakeSession:
        """A session with the vocabulary of ``artifact``, or 256 tokens for a plain file."""
        if options.device not in ("auto", "cpu"):
            raise UnsupportedTarget(f"the fake runtime has no {options.device}: try --device cpu")
        facts = artifact.manifest.artifact.model if artifact.manifest else None
        trained = facts.context_length if facts else TRAINED_CONTEXT
        room = limits.context_tokens(options.context_tokens, trained, artifact.path)
        vocab_size = facts.vocab_size if facts else VOCAB_SIZE
        return FakeSession(vocab_size, room, trace=options.trace)


class FakeSession(SteppedSession):
    """Logits in [-8, 8) that depend on every token in the cache and its place."""

    runtime = "fake"
    device = "cpu"
    kv_dtype = "f32"

    def __init__(self, vocab_size: int, context_tokens: int, *, trace: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self._states: list[np.uint64] = []
        self._steps: list[TracedStep] | None = [] if trace else None
        self._mix = np.arange(1, vocab_size + 1, dtype=np.uint64) * MULTIPLIER

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

    def finish_trace(self) -> Sequence[TracedStep]:
        self._check_open()
        if self._steps is None:
            raise limits.untraced()
        self.close()
        return self._steps

    def close(self) -> None:
        self._closed = True
        self._tokens, self._states = [], []

    def _compute(self, token_ids: Sequence[int], outputs: int) -> Logits | None:
        started = time.perf_counter()
        rows = []
        for token in token_ids:
            before = int(self._states[-1]) if self._states else 0
            self._states.append(np.uint64((before * 0x100000001B3 + token + 1) % (1 << 64)))
            rows.append(self._logits())
        if self._steps is not None:
            self._steps.append(_made_up(len(token_ids), started, time.perf_counter()))
        return np.array(rows[-outputs:]) if outputs else None

    def _forget(self, length: int) -> None:
        del self._states[length:]

    def _logits(self) -> Logits:
        spread = ((self._mix ^ self._states[-1]) * MULTIPLIER) >> np.uint64(40)
        logits: Logits = spread.astype(np.float32) / np.float32(1 << 20) - np.float32(8)
        return logits


def _made_up(tokens: int, start_s: float, end_s: float) -> TracedStep:
    """Most of a step's time, shared out to operators that there were not."""
    events = []
    begins = start_s
    for layer in range(LAYERS):
        for kind, share in PARTS.items():
            seconds = (end_s - start_s) * share / (LAYERS + 2)
            events.append(OperatorEvent(f"{kind}-{layer}", kind, layer, begins, seconds))
            begins += seconds
    events.append(OperatorEvent("head", "Product", None, begins, (end_s - start_s) / (LAYERS + 2)))
    return TracedStep(tokens, start_s, end_s - start_s, tuple(events))
