"""Cells of several profiles against each other: only like with like, unless told otherwise."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from edgellm.errors import UsageError
from edgellm.profiling import document
from edgellm.profiling.gate import Condition, judged
from edgellm.profiling.intervals import ratio as ratio_of
from edgellm.profiling.intervals import unpaired

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
    "encode_s": ("lower", lambda cell: _samples(cell.encode_s)),
    "latency_s": ("lower", lambda cell: _by_round(cell)),
    "texts_per_s": ("higher", lambda cell: _samples(cell.texts_per_s)),
    "load_s": ("lower", lambda cell: _samples(cell.load_s)),
    MEMORY: ("lower", lambda cell: [cell.memory.peak_bytes] if cell.memory else []),
}
"""What is compared: which way is better, and a cell's samples of it."""


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
    """All pairs, and sentences about them.

    ``differences``: what is unlike between sides that were compared all the same. ``missing``:
    cells that failed, and those that nothing was compared with. ``noisy``: sides whose figures may
    mislead, and why. ``doubtful``: changes that a condition does not accept, but that are not
    certain. ``failed``: conditions that came true for certain, and where there are conditions,
    cells that they cannot be judged of because they failed or are not there any more.
    """

    by: str
    pairs: tuple[Pair, ...]
    differences: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    label: str
    cell: document.Cell
    machine: str
    run: int
    """Of cells of one run, the rounds are pairs."""

    def identity(self) -> dict[str, str]:
        """What must be equal for figures to be comparable, by name."""
        artifact, settings = self.cell.artifact, self.cell.settings
        return {
            "model": artifact.model_sha256 or artifact.sha256,
            "artifact": artifact.sha256,
            "prompt tokens": str(settings.prompt_tokens),
            "new tokens": str(settings.new_tokens),
            "depth": str(settings.depth_tokens),
            "task": settings.task,
            "batch": str(settings.batch),
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

MEANT: dict[str | None, frozenset[str]] = {
    None: frozenset(),
    "backend": frozenset({"runtime", "device"}),
    "machine": frozenset({"machine"}),
    "quant": frozenset({"artifact"}),
}
"""By what is compared: what of it makes the difference, where anything is unlike at all."""

SHOWN_DIFFERENCES = 4
"""So many are named where comparing is refused: a matrix easily has dozens."""


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
    conditions = [Condition.parsed(text, QUANTITIES) for text in fail_if]
    sides = [_sides(name, profile, several=len(profiles) > 1) for name, profile in profiles]
    if by is None and len(sides) < 2:
        raise UsageError("one profile has nothing to be compared with: name another, or give --by")
    found = _runs(sides) if by is None else _within(sides, by, unlike=unlike)
    if found.differences and not unlike:
        raise UsageError(
            f"these runs are unlike: {_listed(found.differences)}. Measure alike, say what may "
            "differ with --by, or compare all the same (--unlike)"
        )
    pairs = tuple(pair for of, to in found.matched for pair in _pairs(of, to))
    if not pairs:
        alone = _listed(found.alone) or "none has figures"
        raise UsageError(
            f"no two cells can be compared: {alone}. Measure alike, or compare all the same "
            "(--unlike)"
        )
    broken = _broken(profiles)
    failed, doubtful = judged(pairs, conditions)
    if conditions:
        failed = (*failed, *broken, *found.lost)
    met = dict.fromkeys(side for match in found.matched for side in match)
    return Comparison(
        by=by or "run",
        pairs=pairs,
        differences=found.differences,
        missing=tuple(dict.fromkeys((*broken, *found.lost, *found.alone))),
        noisy=tuple(
            dict.fromkeys(
                f"{side.label}: {'; '.join(side.cell.noisy)}" for side in met if side.cell.noisy
            )
        ),
        doubtful=doubtful,
        failed=failed,
    )


@dataclass(frozen=True, slots=True)
class _Matches:
    """Who is compared with whom. Sentences: ``differences`` of those that are unlike; ``lost``,
    cells of the first profile that a later one lacks; ``alone``, others that are like none."""

    matched: Sequence[tuple[_Side, _Side]]
    differences: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


def _runs(sides: Sequence[Sequence[_Side]]) -> _Matches:
    """Each side of a later run with that of the first which is the same, or else the nearest."""
    bases, matched = sides[0], []
    differences: dict[str, None] = {}
    lost = []
    for of_file in sides[1:]:
        met = set()
        for side in of_file:
            base = _like(side, bases, None)
            if base is None:
                base = _nearest(side, bases)
                differences[_difference(side, base)] = None
            matched.append((side, base))
            met.add(base)
        lost += [
            _lost(base) for base in bases if base not in met and _like(base, of_file, None) is None
        ]
    return _Matches(matched, tuple(differences), tuple(dict.fromkeys(lost)))


def _within(sides: Sequence[Sequence[_Side]], by: str, *, unlike: bool) -> _Matches:
    """Each side with the one that it is most like; ``unlike``: what is left with the nearest."""
    bases: list[_Side] = []
    matched: list[tuple[_Side, _Side]] = []
    for side in (side for of_file in sides for side in of_file):
        base = _like(side, bases, by)
        if base is None:
            bases.append(side)
        else:
            matched.append((side, base))
    met = {base for _, base in matched}
    left = [base for base in bases if base not in met]
    if unlike:
        nearest = [
            (side, _nearest(side, bases[: bases.index(side)])) for side in left if side != bases[0]
        ]
        differences = tuple(_difference(*pair) for pair in nearest)
        return _Matches([*matched, *nearest], differences)
    first = sides[0] if len(sides) > 1 and matched else ()
    return _Matches(
        matched,
        lost=tuple(_lost(side) for side in left if side in first),
        alone=tuple(
            _difference(side, _nearest(side, [each for each in bases if each != side]))
            for side in left
            if side not in first and len(bases) > 1
        ),
    )


def _lost(base: _Side) -> str:
    return f"{base.label} has figures, and what is compared with it has none"


def _broken(profiles: Sequence[tuple[str, document.Profile]]) -> tuple[str, ...]:
    """Cells that failed in the later profiles, or in the only one."""
    later = profiles[1:] or profiles
    return tuple(
        f"{_label(name, cell, several=len(profiles) > 1)} failed: {cell.failure}"
        for name, profile in later
        for cell in profile.cells
        if cell.failure
    )


def _label(name: str, cell: document.Cell, *, several: bool) -> str:
    return f"{name}: {cell.name}" if several else cell.name


def _sides(name: str, profile: document.Profile, *, several: bool) -> list[_Side]:
    found = profile.conditions
    gib = found.memory_bytes / 2**30
    machine = f"{found.cpu}, {found.physical_cores} cores, {gib:.0f} GiB, {found.os}"
    machine += "".join(f", {gpu}" for gpu in found.gpus)
    return [
        _Side(_label(name, cell, several=several), cell, machine, id(profile))
        for cell in profile.cells
        if cell.rounds
    ]


def _like(side: _Side, bases: Sequence[_Side], by: str | None) -> _Side | None:
    """The one of ``bases`` that ``side`` differs from least, of those that it may be compared with.

    Of equals the first; of the same artifact twice, the one of its name.
    """
    alike = []
    for base in bases:
        unlike = set(_unlike(side, base))
        if unlike <= MAY_DIFFER[by] and (not unlike or unlike & MEANT[by]):
            renamed = by is None and base.cell.name != side.cell.name
            alike.append((len(unlike), renamed, base))
    return min(alike, key=lambda each: each[:2])[2] if alike else None


def _nearest(side: _Side, bases: Sequence[_Side]) -> _Side:
    if not bases:
        raise UsageError("the first profile has no figures to compare with: measure it again")
    return min(bases, key=lambda base: len(_unlike(side, base)))


def _unlike(side: _Side, base: _Side) -> list[str]:
    ours, theirs = side.identity(), base.identity()
    return [name for name in ours if ours[name] != theirs[name]]


def _listed(differences: Sequence[str]) -> str:
    """The first few; how many are left."""
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    left = len(differences) - SHOWN_DIFFERENCES
    return f"{shown}; and {left} more such pairs" if left > 0 else shown


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
        noisy = bool(of.cell.noisy or to.cell.noisy) and quantity != MEMORY
        if of.run == to.run:
            names = (of.label, to.label)
            paired = ratio_of(ours, theirs, quantity, better=better, noisy=noisy, names=names)
            ratio, verdict = paired.ratio, paired.verdict
        else:
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


def _by_round(cell: document.Cell) -> Sequence[float]:
    """The median of each round's latencies; what has no samples, or not whole rounds, has none."""
    known = cell.latency_s.samples if cell.latency_s else ()
    each = len(known) // max(1, cell.rounds)
    if not known or each * cell.rounds != len(known):
        return ()
    return [statistics.median(known[at : at + each]) for at in range(0, len(known), each)]


def _samples(figure: document.Figure | None) -> Sequence[float]:
    return figure.samples if figure else ()
