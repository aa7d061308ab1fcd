"""Prefill and decode speed of two loops that stay loaded and take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Loop, interleaved, settle
from benchmarks.results import Comparison

NEW_TOKENS = 128
STARTS = 3
ROUNDS = 4
Samples = dict[str, tuple[list[float], list[float]]]
"""Ours and the peer's, by quantity."""
Bounds = dict[str, tuple[float | None, float | None]]
"""The least and the most of a ratio, by quantity; None where there is no target."""
QUANTITIES = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}


def compare(
    ours: Sequence[str],
    peer: Sequence[str],
    *,
    label: str,
    at_least: dict[str, float],
    quick: bool,
) -> tuple[list[Comparison], float]:
    """Comparisons of prefill and decode, and the share of equal greedy tokens of the last round.

    Both programs are started anew several times, since where memory falls moves a process's speed
    by some percent; in each start they take turns round by round, after one round each that is not
    counted. Who is loaded first and goes first changes from start to start.
    ``at_least`` bounds the ratio of a quantity, where there is a target.
    """
    samples: Samples = {name: ([], []) for name in QUANTITIES}
    last: list[dict[str, Any]] = []
    for start in range(1 if quick else STARTS):
        if not quick:
            settle()
        swapped = start % 2
        first, second = (peer, ours) if swapped else (ours, peer)
        with Loop(first) as first_loop, Loop(second) as second_loop:
            a, b = interleaved(
                first_loop.round, second_loop.round, pairs=1 if quick else ROUNDS, warm_up=1
            )
        if swapped:
            a, b = b, a
        for name, key in QUANTITIES.items():
            samples[name][0].extend(answer[key] for answer in a)
            samples[name][1].extend(answer[key] for answer in b)
        last = [a[-1], b[-1]]
    bounds: Bounds = {name: (at_least.get(name), None) for name in QUANTITIES}
    tokens = [answer["tokens"] for answer in last]
    agreement = sum(x == y for x, y in zip(*tokens, strict=True)) / len(tokens[0])
    return _comparisons(samples, label, bounds), agreement


def compare_in_one_process(
    command: Sequence[str], *, label: str, bounds: Bounds, starts: int, quick: bool
) -> list[Comparison]:
    """Comparisons of the quantities that ``bounds`` names.

    ``command`` measures both in each of its rounds, as ``ours`` and ``peer``; it is started anew
    ``starts`` times.
    """
    samples: Samples = {name: ([], []) for name in QUANTITIES}
    for _ in range(1 if quick else starts):
        if not quick:
            settle()
        with Loop(command) as loop:
            loop.round()
            for _ in range(1 if quick else ROUNDS):
                both = loop.round()
                for name, key in QUANTITIES.items():
                    samples[name][0].append(both["ours"][key])
                    samples[name][1].append(both["peer"][key])
    return _comparisons(samples, label, bounds)


def _comparisons(samples: Samples, label: str, bounds: Bounds) -> list[Comparison]:
    return [
        Comparison(f"{name}, {label}", "tokens/s", *samples[name], at_least=least, at_most=most)
        for name, (least, most) in bounds.items()
    ]


def new_tokens(*, quick: bool) -> int:
    """How many tokens a round decodes."""
    return 8 if quick else NEW_TOKENS


def threads_label(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread{'s' if threads > 1 else ''}"
