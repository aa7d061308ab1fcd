"""Where a decoded token's time goes, by kind of operator and by layer.

Watching costs time, in some backends much of it, so this is a run of its own beside the one that
is timed; the same tokens are decoded unwatched before, which tells how much. Of either run the
quicker half of the tokens counts: what else runs on a machine makes tokens slower, never quicker,
and means of the same tokens add up.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np

from edgellm.errors import GenerationError, OutputError, UnsupportedTarget
from edgellm.hardware import detect
from edgellm.profiling.chrome_trace import chrome_trace
from edgellm.profiling.document import Operator, Operators
from edgellm.runtimes.operators import OperatorEvent, TracedStep

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.runtimes.session import RunOptions, Runtime, Session, TracedSession

TOKENS = 16
"""Tokens that are watched: traces of more grow large and say no more."""

SETTLING_TOKENS = 2
"""Decoded before those that count: the first ones take memory and wake threads."""

OUTSIDE = "outside the layers"
"""What belongs to no layer: embedding, last norm, head, positions."""


def measure_operators(
    runtime: Runtime,
    artifact: Artifact,
    options: RunOptions,
    prompt: Sequence[int],
    *,
    tokens: int = TOKENS,
    trace: Path | None = None,
) -> Operators:
    """Where the time of ``tokens`` decoded tokens goes that follow ``prompt``, greedily.

    Two sessions are opened, one after the other. ``trace``: a file for ui.perfetto.dev, written
    with the prompt in it too. Where the runtime cannot tell, the result says why and nothing is
    written. Raises as ``Runtime.open`` and ``Session`` do, and ``OutputError`` for the file.
    """
    found = runtime.capabilities(detect())
    if not found.traces_operators:
        said = found.tracing or f"{found.runtime} does not tell what its operators take"
        return Operators(reason=said)
    plain = runtime.open(artifact, replace(options, trace=False))
    try:
        plain_s = _decode_times(plain, prompt, tokens)
    finally:
        plain.close()
    try:
        watched = cast("TracedSession", runtime.open(artifact, replace(options, trace=True)))
    except UnsupportedTarget as error:
        return Operators(reason=str(error))
    try:
        watched_s = _decode_times(watched, prompt, tokens)
        steps = watched.finish_trace()
    finally:
        watched.close()
    decoded = steps[-tokens:]
    if len(decoded) != tokens or any(step.tokens != 1 for step in decoded):
        raise GenerationError(
            f"{found.runtime} was given {tokens} tokens one by one, and its trace has "
            f"{[step.tokens for step in decoded]} in its last steps: leave the operators out"
        )
    if trace is not None:
        _write(trace, chrome_trace(steps, decoded=tokens + SETTLING_TOKENS))
    calm = quicker_half(watched_s)
    token_s = statistics.fmean(plain_s[place] for place in quicker_half(plain_s))
    watched_token_s = statistics.fmean(watched_s[place] for place in calm)
    counted = [decoded[place] for place in calm]
    return Operators(
        source=found.tracing,
        tokens=tokens,
        overhead=watched_token_s / token_s - 1,
        token_s=token_s,
        watched_token_s=watched_token_s,
        by_kind=by_kind(counted),
        by_layer=by_layer(counted),
        trace=str(trace) if trace is not None else "",
    )


def quicker_half(seconds: Sequence[float]) -> list[int]:
    """The places of the lesser half of ``seconds``, of an odd number the larger half."""
    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    return sorted(order[: (len(seconds) + 1) // 2])


def by_kind(steps: Sequence[TracedStep]) -> tuple[Operator, ...]:
    """What each kind of operator took of a step, the dearest first."""
    rows = _summed(steps, lambda event: event.kind)
    return tuple(sorted(rows.values(), key=lambda row: (-row.seconds, row.name)))


def by_layer(steps: Sequence[TracedStep]) -> tuple[Operator, ...]:
    """What each layer took of a step, in their order, and last what belongs to none."""
    rows = _summed(steps, lambda event: _layer_name(event.layer))
    found = {event.layer for step in steps for event in step.events}
    layers = sorted(layer for layer in found if layer is not None)
    names = [*map(_layer_name, layers), OUTSIDE]
    return tuple(rows[name] for name in names if name in rows)


def _summed(
    steps: Sequence[TracedStep], name_of: Callable[[OperatorEvent], str]
) -> dict[str, Operator]:
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for step in steps:
        for event in step.events:
            name = name_of(event)
            seconds[name] += event.seconds
            calls[name] += 1
    whole = sum(seconds.values())
    return {
        name: Operator(
            name=name,
            seconds=seconds[name] / len(steps),
            share=seconds[name] / whole if whole else 0.0,
            calls=calls[name] / len(steps),
        )
        for name in seconds
    }


def _layer_name(layer: int | None) -> str:
    return OUTSIDE if layer is None else f"layer {layer}"


def _decode_times(session: Session, prompt: Sequence[int], tokens: int) -> list[float]:
    """Compute the prompt, decode a few tokens to settle, then ``tokens``; the times of those."""
    token = int(np.argmax(session.prefill(prompt)[-1]))
    times = []
    for _ in range(SETTLING_TOKENS + tokens):
        started = perf_counter()
        logits = session.decode(token)
        times.append(perf_counter() - started)
        token = int(np.argmax(logits))
    return times[SETTLING_TOKENS:]


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write the trace {path}: {error.strerror}") from error
