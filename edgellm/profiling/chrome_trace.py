"""A trace of operators as a file that ui.perfetto.dev and chrome://tracing open.

Google's "Trace Event Format": complete events (``ph`` is ``X``) with ``ts`` and ``dur`` in
microseconds; one that lies within another on the same thread is drawn below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import msgspec

from edgellm.runtimes.operators import OperatorEvent, TracedStep

PROCESS = 1
PROMPT, DECODING = 1, 2
"""Threads of the trace, which are drawn as sections of their own."""


def chrome_trace(steps: Sequence[TracedStep], *, decoded: int) -> bytes:
    """The file's content. Of ``steps``, the last ``decoded`` are tokens of the answer.

    Steps hold layers, which hold operators. Time begins with the first step.
    """
    events = [
        _named("process_name", "edgellm"),
        _named("thread_name", "prompt", PROMPT),
        _named("thread_name", "decoding", DECODING),
    ]
    first = len(steps) - decoded
    zero_ns = _ns(steps[0].start_s) if steps else 0
    for place, step in enumerate(steps):
        thread = PROMPT if place < first else DECODING
        title = f"token {place - first + 1}" if place >= first else f"{step.tokens} tokens"
        for event in _of_step(step, title):
            event["ts"] = (event["ts"] - zero_ns) / 1000
            event["dur"] /= 1000
            events.append(event | {"pid": PROCESS, "tid": thread})
    content = {"traceEvents": events, "displayTimeUnit": "ms"}
    return msgspec.json.encode(content) + b"\n"


def _of_step(step: TracedStep, title: str) -> Iterator[dict[str, Any]]:
    """The step, its layers and their operators, each after what holds it; in nanoseconds."""
    end_s = step.start_s + step.seconds
    yield _slice(title, "step", step.start_s, end_s, {"tokens": step.tokens})
    for layer, group in groupby(step.events, key=lambda event: event.layer):
        run = list(group)
        if layer is not None:
            end_s = max(map(_end_s, run))
            yield _slice(f"layer {layer}", "layer", run[0].start_s, end_s, {"layer": layer})
        for event in run:
            told = {"name": event.name} | ({} if layer is None else {"layer": layer})
            yield _slice(event.kind, "operator", event.start_s, _end_s(event), told)


def _slice(
    name: str, category: str, start_s: float, end_s: float, told: dict[str, Any]
) -> dict[str, Any]:
    # Both ends are rounded, not the length: what lies within another does so afterwards too.
    start_ns = _ns(start_s)
    length_ns = _ns(end_s) - start_ns
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": start_ns,
        "dur": length_ns,
        "args": told,
    }


def _named(what: str, name: str, thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": thread, "args": {"name": name}}


def _end_s(event: OperatorEvent) -> float:
    return event.start_s + event.seconds


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
