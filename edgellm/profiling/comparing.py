"""Cells of several profiles against each other: only like with like, unless told otherwise."""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from edgellm.errors import UsageError
from edgellm.profiling import document
from edgellm.profiling.intervals import NOT_SHOWN, unpaired

By = Literal["backend", "machine", "quant"]

Better = Literal["higher", "lower"]

MEMORY = "peak_memory_bytes"
MEMORY_SPREAD = 0.02
"""A cell has one peak, which differs by less between runs; busy neighbours do not change it."""

QUANTITIES: dict[str, tuple[Better, Callable[[document.Cell], Sequence[float]]]] = {
    "time_to_first_token_s": ("lower", lambda cell: _samples(cell.time_to_first_token_s)),
    "prefill_tokens_per_s": ("higher", lambda cell: _samples(cell.prefill_tokens_per_s)),
    "decode_tokens_per_s": ("higher", lambda cell: _samples(cell.decode_tokens_per_s)),
    "end_to_end_s": ("lower", lambda cell: _samples(cell.end_to_end_s)),
    "load_s": ("lower", lambda cell: _samples(cell.load_s)),
    MEMORY: ("lower", lambda cell: [cell.memory.peak_bytes] if cell.memory else []),
}
"""What is compared: which way is better, and a cell's samples of it."""

CONDITION = re.compile(r"\s*(\w+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*%\s*")


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """``of`` against ``to`` in one quantity: ``ratio`` of medians, and what can be said of it.

    Each is ``FILE: CELL``. ``verdict`` as in ``document.Ratio``; of memory
    ``more`` or ``less``.
    """

    quantity: str
    of: str
    to: str
    of_median: float
    to_median: float
    ratio: document.Figure
    verdict: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All pairs; ``differences``: what is unlike between sides that were compared all the same.

    ``failed``: the conditions that came true, each in a sentence.
    """

    by: str
    pairs: tuple[Pair, ...]
    differences: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """A change in percent that is not accepted, as ``decode_tokens_per_s < -5%``."""

    text: str
    quantity: str
    holds: Callable[[float, float], bool]
    percent: float

    @classmethod
    def parsed(cls, text: str) -> Condition:
        """Raises ``UsageError`` for what is no condition."""
        found = CONDITION.fullmatch(text)
        if not found or found[1] not in QUANTITIES:
            raise UsageError(
                f"--fail-if {text!r} is not understood: give QUANTITY < PERCENT% or > PERCENT%, as "
                f"'decode_tokens_per_s < -5%'; quantities are {', '.join(QUANTITIES)}"
            )
        compare = operator.lt if found[2] == "<" else operator.gt
        return cls(text, found[1], compare, float(found[3]))


@dataclass(frozen=True, slots=True)
class _Side:
    label: str
    cell: document.Cell
    machine: str

    def identity(self) -> dict[str, str]:
        """What must be equal for figures to be comparable, by name."""
        artifact, settings = self.cell.artifact, self.cell.settings
        return {
            "model": artifact.model_sha256 or artifact.sha256,
            "artifact": artifact.sha256,
            "prompt tokens": str(settings.prompt_tokens),
            "new tokens": str(settings.new_tokens),
            "depth": str(settings.depth_tokens),
            "threads": str(settings.threads or "default"),
            "runtime": settings.runtime,
            "device": settings.device,
            "cache": settings.kv_cache,
            "machine": self.machine,
        }


MAY_DIFFER: dict[str | None, frozenset[str]] = {
    None: frozenset(),
    "backend": frozenset({"runtime", "device", "cache", "artifact"}),
    "machine": frozenset({"machine", "threads", "device"}),
    "quant": frozenset({"artifact"}),
}
"""By what is compared: what may be unlike. Other backends want other containers."""


def compare(
    profiles: Sequence[tuple[str, document.Profile]],
    *,
    by: str | None = None,
    fail_if: Sequence[str] = (),
    unlike: bool = False,
) -> Comparison:
    """Every cell against the first one that it is like; the first profile's come first.

    ``by``: what may differ, and within one profile too; None compares the same cells of several
    profiles. ``unlike``: compare the nearest where none is like. Raises ``UsageError`` otherwise,
    with what differs, and for a condition that is not understood.
    """
    if by is not None and by not in get_args(By):
        raise UsageError(f"--by {by!r} is none: choose {', '.join(get_args(By))}")
    conditions = [Condition.parsed(text) for text in fail_if]
    sides = [_sides(name, profile, several=len(profiles) > 1) for name, profile in profiles]
    if by is None and len(sides) < 2:
        raise UsageError("one profile has nothing to be compared with: name another, or give --by")
    everything = [side for of_file in sides for side in of_file]
    bases, others = (sides[0], sides[1:]) if by is None else ([], [everything])
    pairs: list[Pair] = []
    differences: list[str] = []
    for of_file in others:
        for side in of_file:
            base = _like(side, bases, MAY_DIFFER[by])
            if base is None and by is not None:
                bases.append(side)
                continue
            if base is None:
                base = _nearest(side, bases)
                differences.append(_difference(side, base))
            pairs += _pairs(side, base)
    if differences and not unlike:
        raise UsageError(
            "these runs are unlike: "
            + "; ".join(dict.fromkeys(differences))
            + ". Measure alike, say what may differ with --by, or compare all the same (--unlike)"
        )
    if not pairs:
        raise UsageError(
            "no two cells can be compared: each is unlike every other, or has no figures "
            f"({', '.join(side.label for side in everything)})"
        )
    return Comparison(
        by=by or "run",
        pairs=tuple(pairs),
        differences=tuple(dict.fromkeys(differences)),
        failed=tuple(_failed(pairs, conditions)),
    )


def _sides(name: str, profile: document.Profile, *, several: bool) -> list[_Side]:
    found = profile.conditions
    gib = found.memory_bytes / 2**30
    machine = f"{found.cpu}, {found.physical_cores} cores, {gib:.0f} GiB, {found.os}"
    machine += "".join(f", {gpu}" for gpu in found.gpus)
    return [
        _Side(f"{name}: {cell.name}" if several else cell.name, cell, machine)
        for cell in profile.cells
        if cell.rounds
    ]


def _like(side: _Side, bases: Sequence[_Side], may_differ: frozenset[str]) -> _Side | None:
    return next((base for base in bases if set(_unlike(side, base)) <= may_differ), None)


def _nearest(side: _Side, bases: Sequence[_Side]) -> _Side:
    if not bases:
        raise UsageError("the first profile has no figures to compare with: measure it again")
    return min(bases, key=lambda base: len(_unlike(side, base)))


def _unlike(side: _Side, base: _Side) -> list[str]:
    ours, theirs = side.identity(), base.identity()
    return [name for name in ours if ours[name] != theirs[name]]


def _difference(side: _Side, base: _Side) -> str:
    ours, theirs = side.identity(), base.identity()
    words = [f"{name} {_short(ours[name])} against {_short(theirs[name])}" for name in ours
             if ours[name] != theirs[name]]  # fmt: skip
    return f"{side.label} and {base.label} ({', '.join(words)})"


def _short(value: str) -> str:
    return value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value or "unknown"


def _pairs(of: _Side, to: _Side) -> list[Pair]:
    found = []
    for quantity, (better, samples_of) in QUANTITIES.items():
        ours, theirs = samples_of(of.cell), samples_of(to.cell)
        if not ours or not theirs:
            continue
        noisy = bool(of.cell.noisy or to.cell.noisy)
        ratio, verdict = unpaired(ours, theirs, better=better, noisy=noisy)
        if quantity == MEMORY and abs(ratio.median - 1) > MEMORY_SPREAD:
            verdict = "more" if ratio.median > 1 else "less"
        found.append(
            Pair(
                quantity=quantity,
                of=of.label,
                to=to.label,
                of_median=statistics.median(ours),
                to_median=statistics.median(theirs),
                ratio=ratio,
                verdict=verdict,
            )
        )
    return found


def _failed(pairs: Sequence[Pair], conditions: Sequence[Condition]) -> list[str]:
    """Conditions that came true, where the change is certain and not an effect of noise."""
    found = []
    for condition in conditions:
        for pair in pairs:
            change = 100 * (pair.ratio.median - 1)
            meant = pair.quantity == condition.quantity and pair.verdict != NOT_SHOWN
            if meant and condition.holds(change, condition.percent):
                found.append(
                    f"{condition.text}: {pair.of} differs by {change:+.1f} % from {pair.to}"
                )
    return found


def _samples(figure: document.Figure | None) -> Sequence[float]:
    return figure.samples if figure else ()
