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
QUANTITIES = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}


def compare(
    ours: Sequence[str],
    peer: Sequence[str],
    *,
    label: str,
    at_least: dict[str, float],
    at_most: dict[str, float] | None = None,
    starts: int = STARTS,
    quick: bool,
) -> tuple[list[Comparison], float]:
    """Comparisons of prefill and decode, and the share of equal greedy tokens of the last round.

    Both programs are started anew several times, since where memory falls moves a process's speed;
    in each start they take turns round by round, after one round each that is not counted. Who is
    loaded first and goes first changes from start to start: it is worth some percent.
    ``at_least`` and ``at_most`` bound the ratio of a quantity, where there is a target.
    """
    samples: Samples = {name: ([], []) for name in QUANTITIES}
    last: list[dict[str, Any]] = []
    for start in range(1 if quick else starts):
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
    comparisons = _comparisons(samples, label, at_least, at_most or {})
    tokens = [answer["tokens"] for answer in last]
    if not all(tokens):  # one of them chooses none
        return comparisons, 0.0
    return comparisons, sum(x == y for x, y in zip(*tokens, strict=True)) / len(tokens[0])


def compare_in_one_process(
    command: Sequence[str],
    *,
    label: str,
    at_least: dict[str, float],
    at_most: dict[str, float],
    starts: int,
    quick: bool,
) -> list[Comparison]:
    """As ``compare``, of one program whose rounds measure both, as ``ours`` and ``peer``."""
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
    return _comparisons(samples, label, at_least, at_most)


def _comparisons(
    samples: Samples, label: str, at_least: dict[str, float], at_most: dict[str, float]
) -> list[Comparison]:
    return [
        Comparison(
            f"{name}, {label}",
            "tokens/s",
            *samples[name],
            at_least=at_least.get(name),
            at_most=at_most.get(name),
        )
        for name in QUANTITIES
    ]


def new_tokens(*, quick: bool) -> int:
    """How many tokens a round decodes."""
    return 8 if quick else NEW_TOKENS


def threads_label(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread{'s' if threads > 1 else ''}"
