"""A runtime that wraps another one and writes down what it is asked and how long that takes.

The protocol is ``edgellm.runtimes.session``: a runtime says what it can do (``capabilities``) and
opens artifacts (``open``); a session takes token ids and gives logits. Lines of JSON go to the
file named by ``EDGELLM_TRACE``, or to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm.artifact import Artifact
from edgellm.hardware import Hardware
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import Capabilities, Logits, RunOptions, Session

RUNS = {"onnx": "onnxruntime", "gguf": "llamacpp"}
"""The runtime that does the work, by container."""


class TracingRuntime:
    name = "tracing"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        wrapped = [runtime_named(name).capabilities(hardware) for name in RUNS.values()]
        usable = [found for found in wrapped if found.available]
        return Capabilities(
            runtime=self.name,
            available=bool(usable),
            reason=f"traces {' and '.join(found.runtime for found in usable) or 'nothing here'}",
            version="0.1.0",
            containers=frozenset().union(*(found.containers for found in usable)),
            devices=("cpu",),
            automatic=False,  # only by --runtime tracing
        )

    def open(self, artifact: Artifact, options: RunOptions) -> TracingSession:
        return TracingSession(runtime_named(RUNS[artifact.container]).open(artifact, options))


class TracingSession:
    """Times ``prefill`` and ``decode``; everything else is the wrapped session's own."""

    runtime = "tracing"

    def __init__(self, wrapped: Session) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        started = time.perf_counter()
        logits = self._wrapped.prefill(token_ids, all_logits=all_logits)
        self._write("prefill", len(token_ids), started)
        return logits

    def decode(self, token_id: int) -> Logits:
        started = time.perf_counter()
        logits = self._wrapped.decode(token_id)
        self._write("decode", 1, started)
        return logits

    def _write(self, call: str, tokens: int, started: float) -> None:
        took_ms = round(1e3 * (time.perf_counter() - started), 3)
        facts = {"call": call, "tokens": tokens, "held": len(self._wrapped.tokens), "ms": took_ms}
        line = json.dumps(facts)
        if target := os.environ.get("EDGELLM_TRACE"):
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            print(line, file=sys.stderr)
