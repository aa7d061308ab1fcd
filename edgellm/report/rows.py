"""The cells of all profiles as rows: what each is called, on which machine, and its colour."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edgellm.profiling.document import Cell, Conditions, Profile
from edgellm.report.wording import count, moment, plain, size

MARKS_OF_MAKERS = re.compile(r"\((R|TM|C)\)|\bCPU\b|@.*$|\bProcessor\b", re.IGNORECASE)
"""What is in a processor's name and tells it from no other."""

BETWEEN = " · "
"""Between the artifact and the settings in what a cell's kind is called."""


@dataclass(frozen=True, slots=True)
class Row:
    """A cell and its names.

    ``name``: where the machine is told otherwise. ``label``: where it stands alone. ``kind``:
    artifact and setting without the lengths of prompt, depth and answer; ``series``: that with the
    machine, what a curve over lengths is called. ``tint`` and ``dash`` count the looks of series.
    """

    cell: Cell
    profile: Profile
    machine: str
    name: str
    label: str
    kind: str
    series: str
    tint: int
    dash: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, answer and depth."""
        settings = self.cell.settings
        return settings.prompt_tokens, settings.new_tokens, settings.depth_tokens

    @property
    def asked(self) -> tuple[object, ...]:
        """What is equal of cells that can be compared: task, lengths, texts at a time."""
        return (self.cell.settings.task, *self.lengths, self.cell.settings.batch)

    @property
    def reads(self) -> bool:
        """Whether it is an encoder's, which writes nothing."""
        return self.cell.settings.task in ("embed", "label", "fill")


def rows(profiles: Sequence[Profile]) -> list[Row]:
    """A row for every cell, in the profiles' order."""
    names = machine_names(profiles)
    several = len(set(names)) > 1
    pairs = [
        (profile, machine, cell)
        for profile, machine in zip(profiles, names, strict=True)
        for cell in profile.cells
    ]
    series = _series([cell for _, _, cell in pairs])
    machines, kinds = _numbered(names), _numbered(series)
    seen = Counter((machine, cell.name) for _, machine, cell in pairs)
    made = []
    for (profile, machine, cell), kind in zip(pairs, series, strict=True):
        name = plain(cell.name)
        if seen[machine, cell.name] > 1:
            name += f", {moment(profile.started)}"
        made.append(
            Row(
                cell=cell,
                profile=profile,
                machine=machine,
                name=name,
                label=f"{name} · {machine}" if several else name,
                kind=kind,
                series=f"{kind} · {machine}" if several else kind,
                tint=machines[machine] if several else kinds[kind],
                dash=kinds[kind] if several else 0,
            )
        )
    return _told_apart(made)


def machine_names(profiles: Sequence[Profile]) -> list[str]:
    """What each profile's machine is called: its processor, and more where two share that."""
    details: tuple[Callable[[Conditions], str], ...] = (
        lambda found: _short(found.cpu),
        lambda found: f"{found.physical_cores} cores",
        lambda found: size(found.memory_bytes),
        lambda found: " ".join(map(plain, found.gpus)),
        lambda found: plain(found.os),
    )
    facts = [tuple(detail(each.conditions) for detail in details) for each in profiles]
    names = [fact[0] for fact in facts]
    for depth in range(1, len(details) + 1):
        clashing = {name for name in names if len(_of(facts, names, name)) > 1}
        if not clashing or depth == len(details):
            break
        names = [
            f"{name}, {fact[depth]}" if name in clashing and fact[depth] else name
            for name, fact in zip(names, facts, strict=True)
        ]
    return names


def several_machines(found: Sequence[Row]) -> bool:
    """Whether the rows come from more than one machine."""
    return len({row.machine for row in found}) > 1


def models(found: Iterable[Row]) -> list[str]:
    """Digests of the models that artifacts were made from; an empty one where it is not known."""
    return list(dict.fromkeys(row.cell.artifact.model_sha256 for row in found))


def _short(cpu: str) -> str:
    return plain(MARKS_OF_MAKERS.sub(" ", plain(cpu))) or "unknown processor"


def _of(facts: Sequence[tuple[str, ...]], names: Sequence[str], name: str) -> set[tuple[str, ...]]:
    return {fact for fact, each in zip(facts, names, strict=True) if each == name}


def _threads(cell: Cell) -> str:
    threads = cell.settings.threads
    return count(threads, "thread") if threads else "own choice of threads"


def _series(cells: Sequence[Cell]) -> list[str]:
    """For each cell its artifact, and those of its settings that are not the same everywhere."""
    details: tuple[Callable[[Cell], str], ...] = (
        lambda cell: plain(cell.settings.runtime),
        lambda cell: plain(cell.settings.device),
        _threads,
        lambda cell: f"{plain(cell.settings.kv_cache)} cache" if cell.settings.kv_cache else "",
    )
    varying = [each for each in details if len({each(cell) for cell in cells}) > 1]
    digests: dict[str, set[str]] = {}
    for cell in cells:
        digests.setdefault(cell.artifact.name, set()).add(cell.artifact.sha256)
    return [
        BETWEEN.join(
            [
                plain(cell.artifact.name) or "unnamed",
                *([cell.artifact.sha256[:8]] if len(digests[cell.artifact.name]) > 1 else []),
                *(text for detail in varying if (text := detail(cell))),
            ]
        )
        for cell in cells
    ]


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _told_apart(found: list[Row]) -> list[Row]:
    """``found`` with a number behind the labels that are still alike."""
    alike = Counter(row.label for row in found)
    met: Counter[str] = Counter()
    told = []
    for row in found:
        met[row.label] += 1
        mark = f" ({met[row.label]})" if alike[row.label] > 1 else ""
        told.append(replace(row, name=row.name + mark, label=row.label + mark))
    return told
