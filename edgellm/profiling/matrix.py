"""Which cells a profile has: artifacts x runtimes x settings, and why some cannot be."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

from edgellm.artifact import Artifact
from edgellm.errors import EdgeError, UsageError
from edgellm.hardware import Hardware, pick
from edgellm.profiling.document import Task
from edgellm.profiling.tasks import (
    RUNTIME,
    USUAL,
    check_heeded,
    check_together,
    task_of,
    too_long,
)
from edgellm.runtimes.session import Capabilities, Device, KvDtype

ALL = "all"
"""The name that stands for every runtime here that opens the artifact."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What to vary; every combination is a cell. None leaves the choice to edgellm.

    ``runtimes``: names, or ``all``. ``batches``: texts that an encoder is asked of together.
    Lengths that are not named are the usual ones of each task (``USUAL``).
    """

    runtimes: Sequence[str | None] = (None,)
    devices: Sequence[str] = ("auto",)
    threads: Sequence[int | None] = (None,)
    kv_caches: Sequence[str | None] = (None,)
    prompt_tokens: Sequence[int] | None = None
    new_tokens: Sequence[int] | None = None
    depth_tokens: Sequence[int] = (0,)
    batches: Sequence[int] = (1,)

    def check(self) -> None:
        """Raise ``UsageError`` for what no cell can have."""
        allowed = {
            "--device": (self.devices, get_args(Device)),
            "--kv-cache": ([each for each in self.kv_caches if each], get_args(KvDtype)),
        }
        for option, (given, names) in allowed.items():
            wrong = [each for each in given if each not in names]
            if wrong:
                raise UsageError(f"{option} {wrong[0]!r} is none: choose {', '.join(names)}")
        least = {
            "--threads": (self.threads, 1),
            "--prompt-tokens": (self.prompt_tokens or (), 1),
            "--new-tokens": (self.new_tokens or (), 1),
            "--depth": (self.depth_tokens, 0),
            "--batch": (self.batches, 1),
        }
        for option, (counts, low) in least.items():
            few = [each for each in counts if each is not None and each < low]
            if few:
                raise UsageError(f"{option} {few[0]}: choose {low} or more")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One cell before it is measured; ``refusal``: why it cannot be."""

    artifact: Artifact
    runtime: str
    device: str
    threads: int | None
    kv_cache: str | None
    prompt_tokens: int
    new_tokens: int
    depth_tokens: int
    task: Task = "generate"
    batch: int = 1
    runtime_version: str = ""
    refusal: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other cells."""
        counts = (
            *(self.threads, self.prompt_tokens, self.new_tokens, self.depth_tokens),
            self.batch,
        )
        return (self.artifact.path, self.runtime, self.device, self.kv_cache, *counts)


@dataclass(frozen=True, slots=True)
class Matrix:
    """``cells`` with a ``names`` entry each, and what was chosen or left out, for people."""

    cells: tuple[Wanted, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def matrix(
    artifacts: Sequence[Artifact],
    asked: Asked,
    hardware: Hardware,
    capabilities: Sequence[Capabilities],
    *,
    operators: bool = False,
) -> Matrix:
    """Every combination of what was ``asked`` for that the runtimes can do.

    A runtime that does not open an artifact's container makes no cell beside others that do. Raises
    ``UsageError`` for a name that no runtime has, artifacts of several kinds, and what would not be
    heeded of one, ``operators`` among it.
    """
    asked.check()
    check_together(artifacts)
    cells: list[Wanted] = []
    notes: list[str] = []
    for artifact in artifacts:
        task = task_of(artifact)
        check_heeded(artifact, task, asked, operators=operators)
        usual = USUAL[task]
        lengths = itertools.product(
            asked.prompt_tokens or (usual.prompt_tokens,),
            asked.new_tokens or (usual.new_tokens,),
            asked.depth_tokens,
            asked.batches,
        )
        asked_of = list(lengths)
        runtimes, refused = (
            _runtimes(artifact, asked, hardware, capabilities)
            if task == "generate"
            else ([RUNTIME], [])
        )
        notes += refused
        for runtime, device, kv_cache in itertools.product(
            runtimes, asked.devices, asked.kv_caches
        ):
            chosen = _chosen(artifact, runtime, device, kv_cache, hardware, capabilities)
            cores = hardware.physical_cores.value
            threads: list[int | None] = [each or cores for each in asked.threads]
            if not chosen.sets_threads:
                if tuple(asked.threads) != (None,):
                    own = f"{chosen.runtime} chooses its threads itself: --threads not heeded"
                    notes.append(own)
                threads = [None]
            cells += [
                Wanted(
                    artifact,
                    chosen.runtime,
                    chosen.device,
                    count,
                    kv_cache,
                    prompt,
                    new,
                    depth,
                    task=task,
                    batch=batch,
                    runtime_version=chosen.version,
                    refusal=chosen.refusal or too_long(artifact, prompt, new),
                )
                for count, (prompt, new, depth, batch) in itertools.product(threads, asked_of)
            ]
    cells = list({cell.key: cell for cell in cells}.values())
    cpus = os.cpu_count() or 1
    notes += [
        f"{count} threads are more than the {cpus} CPUs of this machine: they wait for each other"
        for count in asked.threads
        if count is not None and count > cpus
    ]
    return Matrix(
        tuple(cells), _names(cells, threads=len(asked.threads) > 1), tuple(dict.fromkeys(notes))
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    runtime: str
    device: str
    version: str = ""
    sets_threads: bool = True
    refusal: str = ""


def _runtimes(
    artifact: Artifact,
    asked: Asked,
    hardware: Hardware,
    capabilities: Sequence[Capabilities],
) -> tuple[list[str | None], list[str]]:
    """Names to try for ``artifact``, and which of those asked for do not open it."""
    named: list[str | None] = []
    for name in asked.runtimes:
        if name == ALL:
            named += [
                one.runtime
                for one in capabilities
                if one.available and one.automatic and artifact.container in one.containers
            ]
        else:
            named.append(name)
    named = list(dict.fromkeys(named))
    known = {one.runtime: one for one in capabilities}
    for name in named:
        if name is not None and name not in known:
            raise UsageError(f"no runtime named {name!r}: choose {', '.join(known)}, or {ALL}")
    opening = [
        name for name in named if name is None or artifact.container in known[name].containers
    ]
    left = [
        f"{_called(artifact)}: {name} does not open {artifact.container}"
        for name in named
        if name not in opening
    ]
    return (opening, left) if opening else (named or [None], [])


def _chosen(
    artifact: Artifact,
    runtime: str | None,
    device: str,
    kv_cache: str | None,
    hardware: Hardware,
    capabilities: Sequence[Capabilities],
) -> _Chosen:
    try:
        choice = pick(
            artifact.container,
            hardware,
            capabilities,
            runtime=runtime,
            device=cast("Device", device),
            kv_dtype=kv_cache,
            compute=artifact.compute,
        )
    except EdgeError as refusal:
        return _Chosen(runtime or "none", device, refusal=str(refusal))
    found = next(one for one in capabilities if one.runtime == choice.runtime)
    return _Chosen(choice.runtime, choice.device, found.version, found.sets_threads)


def _called(artifact: Artifact) -> str:
    return artifact.path.resolve().name  # that of "." too


def _names(cells: Sequence[Wanted], *, threads: bool) -> tuple[str, ...]:
    """The artifact's name and whatever differs between the cells; no two are alike.

    ``threads``: they were asked to differ; a runtime that chooses them itself is no difference.
    """
    shown = {cell.artifact.path: _called(cell.artifact) for cell in cells}
    twice = {name for name, count in Counter(shown.values()).items() if count > 1}
    for path, name in shown.items():
        if name in twice:
            shown[path] = f"{path.resolve().parent.name}/{name}"
    twice = {name for name, count in Counter(shown.values()).items() if count > 1}
    alike = (path for path, name in shown.items() if name in twice)
    for number, path in enumerate(list(alike), 1):
        shown[path] += f" ({number})"
    parts = {
        "runtime": [cell.runtime for cell in cells],
        "device": [cell.device for cell in cells],
        "threads": [_threads(cell.threads) if threads else "" for cell in cells],
        "kv_cache": [f"{cell.kv_cache or 'usual'} cache" for cell in cells],
        "prompt_tokens": [f"{cell.prompt_tokens} in" for cell in cells],
        "new_tokens": [f"{cell.new_tokens} out" for cell in cells],
        "depth_tokens": [f"depth {cell.depth_tokens}" for cell in cells],
        "batch": [f"batch {cell.batch}" for cell in cells],
    }
    varied = [words for words in parts.values() if len(set(words)) > 1]
    return tuple(
        ", ".join([shown[cell.artifact.path], *(words[place] for words in varied)])
        for place, cell in enumerate(cells)
    )


def _threads(count: int | None) -> str:
    if count is None:
        return "own threads"
    return f"{count} thread{'s' * (count != 1)}"
