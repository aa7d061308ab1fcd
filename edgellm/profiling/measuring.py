"""Measures a matrix of cells in rounds: every cell once, then every cell again.

So whatever drifts (heat, other programs) hits all cells alike, and cells of one round can be
compared as pairs. A cell that fails is a row with its reason, and the others go on; Ctrl-C ends the
measuring, and what was done until then is kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from edgellm import __version__
from edgellm.artifact import open_artifact
from edgellm.hardware import Gpu, detect, free_memory_bytes
from edgellm.profiling import document
from edgellm.profiling.artifacts import artifact_facts
from edgellm.profiling.conditions import conditions_now
from edgellm.profiling.energy import counters
from edgellm.profiling.exchange import Job, Ready, Round
from edgellm.profiling.folders import without_folders
from edgellm.profiling.gauges import gauge, noise
from edgellm.profiling.matrix import Asked, Wanted, matrix
from edgellm.profiling.operators import TOKENS as OPERATOR_TOKENS
from edgellm.profiling.process import CellFailed, CellProcess, operators_of
from edgellm.profiling.roofline import measure_limits
from edgellm.profiling.summing import ratios, summed
from edgellm.profiling.tasks import KINDS
from edgellm.runtimes import capabilities_on

ROUNDS = 5
WARMUP_ROUNDS = 1
TIMEOUT_S = 600.0

STARTS = 4
"""How often the processes of cells are started, where there are rounds enough: where its memory
falls makes a process some percent faster than itself started again.
"""

ROUNDS_OF_START = 2
"""At least."""

FREE_SHARE = 0.8
"""Of the free memory, what the processes of all cells may be expected to take together."""

PROCESS_BYTES = 300 << 20
"""What a process takes beside weights, keys and values: Python, the runtime, its work space."""

FLOAT_BYTES = 4

SHARING_MEMORY = ("cpu", "metal", "coreml")
"""Devices that compute in the machine's memory; others have their own."""

PAUSE_S = 0.2
"""Rest before a cell's round: threads of the one before may wait for work at full speed so long."""

STOPPED = "stopped before it was measured"
"""Why a cell has no figures when Ctrl-C came first."""

NOT_COUNTED = (
    "Loading is in load_s alone.",
    "The depth's tokens are in the cache before a round begins.",
    "Warm-up rounds, and a rest before each round, are in no figure.",
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: so many rounds or, with ``budget_s``, as many as that time allows.

    ``timeout_s``: after which a cell that does not answer is given up.
    """

    rounds: int = ROUNDS
    warmup_rounds: int = WARMUP_ROUNDS
    budget_s: float | None = None
    timeout_s: float = TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Step:
    """How far it is: ``cell`` is about to be measured (or loaded), ``decode_tokens_per_s`` and
    ``first_token_s``, or ``texts_per_s`` and ``latency_s``, are of the cell that was measured last;
    ``round`` counts from 1, warm-ups from
    0 down."""

    cell: str
    round: int
    rounds: int
    done_cells: int
    cells: int
    stage: str
    last_cell: str = ""
    decode_tokens_per_s: float | None = None
    first_token_s: float | None = None
    texts_per_s: float | None = None
    latency_s: float | None = None


Watch = Callable[[Step], None]


@dataclass(slots=True)
class Running:
    """A cell as it is measured."""

    name: str
    wanted: Wanted
    facts: document.ArtifactFacts
    process: CellProcess | None = None
    ready: Ready | None = None
    loads_s: list[float] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    gauges: list[tuple[document.Gauge, document.Gauge]] = field(default_factory=list)
    """Before and after each of the ``rounds``."""
    between_s: list[float] = field(default_factory=list)
    """Seconds between those."""
    failure: str = ""

    @property
    def alive(self) -> bool:
        """Whether it can still be measured."""
        return not self.failure


def profile(
    paths: Sequence[str],
    asked: Asked | None = None,
    effort: Effort | None = None,
    *,
    operators: bool = False,
    traces: Path | None = None,
    command: str = "",
    watch: Watch | None = None,
) -> document.Profile:
    """The profile of the artifacts at ``paths``, each with every setting that was ``asked`` for.

    ``operators``: where a token's time goes, too; ``traces`` is then how files for Perfetto begin,
    None for no files. Raises ``EdgeError`` for what cannot be opened or understood, before anything
    is measured.
    """
    asked, effort = asked or Asked(), effort or Effort()
    hardware = detect()
    artifacts = [open_artifact(path) for path in paths]
    found = matrix(artifacts, asked, hardware, capabilities_on(hardware), operators=operators)
    facts = {artifact.path: artifact_facts(artifact) for artifact in artifacts}
    cells = [
        Running(
            name,
            wanted,
            facts[wanted.artifact.path],
            failure=without_folders(wanted.refusal, wanted.artifact.path),
        )
        for name, wanted in zip(found.names, found.cells, strict=True)
    ]
    counts = sorted({cell.wanted.threads or hardware.physical_cores.value for cell in cells})
    started, begun = datetime.now(UTC), time.perf_counter()
    before = gauge()
    limits, doubts = _limits(counts, hardware.physical_cores.value)
    stays = _all_fit(cells, hardware.gpus.value)
    interrupted = False
    taken: dict[str, document.Operators] = {}
    try:
        _rounds(cells, effort, stays, watch or (lambda step: None))
        if operators:
            _watch_operators(cells, effort, traces, taken, watch or (lambda step: None))
    except KeyboardInterrupt:
        interrupted = True
        for cell in cells:
            if cell.alive and not cell.rounds:
                cell.failure = STOPPED
    finally:
        for cell in cells:
            if cell.process is not None:
                cell.process.kill()
    cores = hardware.physical_cores.value
    measured = tuple(
        msgspec.structs.replace(
            summed(cell, limits, cores, effort.warmup_rounds), operators=taken.get(cell.name)
        )
        for cell in cells
    )
    conditions = conditions_now(hardware, limits, before, gauge())
    reads = all(KINDS[cell.wanted.task] == KINDS["embed"] for cell in cells)
    deep = any(cell.wanted.task == "generate" for cell in cells)
    silent = dict.fromkeys(
        reason for cell in cells for each in cell.rounds for reason in each.no_energy
    )
    return document.Profile(
        edgellm=__version__,
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - begun,
        method=document.Method(
            command=command,
            rounds=max((len(cell.rounds) for cell in cells), default=0),
            warmup_rounds=effort.warmup_rounds,
            budget_s=effort.budget_s,
            stayed_loaded=stays,
            starts=max((len(cell.loads_s) for cell in cells), default=0),
            sampling="" if reads else "greedy",
            prompt="the built-in English text for measuring, the same tokens every time",
            not_counted=NOT_COUNTED if deep else (NOT_COUNTED[0], NOT_COUNTED[2]),
        ),
        conditions=msgspec.structs.replace(
            conditions, unknown=(*conditions.unknown, *counters()[1], *silent)
        ),
        limits=limits,
        cells=measured,
        ratios=ratios(measured),
        interrupted=interrupted,
        notes=(*found.notes, *doubts),
    )


def _limits(
    threads: Sequence[int], cores: int
) -> tuple[tuple[document.Limit, ...], tuple[str, ...]]:
    """The machine's best, and why it may be better than what was measured.

    Without memory for measuring them there are none: a small model may still fit.
    """
    before, begun, own_cpu_s = gauge(), time.perf_counter(), time.process_time()
    try:
        found = measure_limits(threads)
    except MemoryError as error:
        reason = str(error) or "memory ran out"
        return (), (f"the machine's limits were not measured, and no shares of them: {reason}",)
    reasons = noise(
        [(before, gauge())],
        own_cpu_s=time.process_time() - own_cpu_s,
        seconds=time.perf_counter() - begun,
        cores=cores,
    )
    note = "the machine's limits are too low and shares of them too high, for as they were measured"
    return found, (f"{note} {' and '.join(reasons)}",) if reasons else ()


def _rounds(cells: Sequence[Running], effort: Effort, stays: bool, watch: Watch) -> None:
    """Measure warm-ups and rounds, until there were enough or the time is over.

    Processes that stay loaded are started several times, in one order and then in the other.
    """
    begun_s = time.perf_counter()
    end_s = None if effort.budget_s is None else begun_s + effort.budget_s
    order, first = list(cells), 1
    # Processes that are started anew in each round warm up by themselves.
    number = 1 - effort.warmup_rounds if stays else 1
    last = Step("", number, 0 if end_s else effort.rounds, 0, len(cells), "")
    while end_s is not None or number <= effort.rounds:
        settled = stays and number - first >= ROUNDS_OF_START
        if settled and _begins_anew(cells, effort, number, time.perf_counter() - begun_s):
            for cell in cells:
                _end(cell)
            order.reverse()
            first = number
        for place, cell in enumerate(order):
            if end_s is not None and number > 1 and time.perf_counter() >= end_s:
                return
            if not cell.alive:
                continue
            last = dataclasses.replace(
                last,
                cell=cell.name,
                round=number,
                done_cells=place,
                stage="measure" if cell.process else "load",
            )
            watch(last)
            took = _measure(cell, effort, counted=number > 0)
            if took is not None:
                last = dataclasses.replace(last, last_cell=cell.name, **_told(cell.wanted, took))
            if not stays:
                _end(cell)
        if not any(cell.alive for cell in cells):
            return
        number += 1


def _begins_anew(cells: Sequence[Running], effort: Effort, number: int, spent_s: float) -> bool:
    """Whether round ``number`` is to be measured by processes that are started for it.

    Within a budget, where loading them leaves at least as long to measure with them.
    """
    starts = max(len(cell.loads_s) for cell in cells)
    if effort.budget_s is not None:
        loading_s = sum(cell.loads_s[-1] for cell in cells if cell.process is not None)
        share = effort.budget_s * starts / STARTS
        return starts < STARTS and share <= spent_s < effort.budget_s - 2 * loading_s
    wanted = min(STARTS, effort.rounds // ROUNDS_OF_START)
    return (number - 1) * wanted >= effort.rounds * starts


def _told(wanted: Wanted, took: Round) -> dict[str, Any]:
    """Figures of a round for whoever watches."""
    mean_s = sum(took.latencies_s) / len(took.latencies_s) if took.latencies_s else None
    if KINDS[wanted.task] == KINDS["embed"]:
        return {"latency_s": mean_s, "texts_per_s": wanted.batch / mean_s if mean_s else None}
    return {
        "first_token_s": took.first_token_s,
        "decode_tokens_per_s": 1 / mean_s if mean_s else None,
    }


def _watch_operators(
    cells: Sequence[Running],
    effort: Effort,
    traces: Path | None,
    taken: dict[str, document.Operators],
    watch: Watch,
) -> None:
    """Put what the operators of each cell take into ``taken``, by the cell's name."""
    for cell in cells:
        _end(cell)
    for place, cell in enumerate(cells):
        if not cell.rounds:
            continue
        watch(Step(cell.name, 0, 0, place, len(cells), "operators"))
        job = _job(cell.wanted)
        trace = "" if traces is None else f"{traces}.{place + 1}.trace.json"
        wanted = msgspec.structs.replace(
            job, operators=True, trace=trace, new_tokens=min(job.new_tokens, OPERATOR_TOKENS)
        )
        found = operators_of(wanted, effort.timeout_s)
        taken[cell.name] = msgspec.structs.replace(
            found,
            trace=Path(found.trace).name,
            reason=without_folders(found.reason, cell.wanted.artifact.path),
        )


def _measure(cell: Running, effort: Effort, *, counted: bool) -> Round | None:
    """One round of one cell, whose process is started where it does not run; None: it failed.

    A process that begins in a counted round warms up first.
    """
    try:
        if cell.process is None:
            cell.process = CellProcess(_job(cell.wanted), effort.timeout_s)
            cell.ready = cell.process.ready
            cell.loads_s.append(cell.ready.load_s)
            for _ in range(effort.warmup_rounds if counted else 0):
                cell.process.round()
        time.sleep(PAUSE_S)
        before, begun = gauge(), time.perf_counter()
        took = cell.process.round()
    except CellFailed as failure:
        cell.failure = without_folders(str(failure), cell.wanted.artifact.path)
        cell.process = None
        return None
    if counted:
        cell.rounds.append(took)
        cell.gauges.append((before, gauge()))
        cell.between_s.append(time.perf_counter() - begun)
    return took


def _end(cell: Running) -> None:
    if cell.process is not None:
        cell.process.close()
        cell.process = None


def _job(wanted: Wanted) -> Job:
    return Job(
        path=str(wanted.artifact.path),
        runtime=wanted.runtime,
        device=wanted.device,
        threads=wanted.threads,
        kv_cache=wanted.kv_cache,
        prompt_tokens=wanted.prompt_tokens,
        new_tokens=wanted.new_tokens,
        depth_tokens=wanted.depth_tokens,
        task=wanted.task,
        batch=wanted.batch,
    )


def _all_fit(cells: Sequence[Running], gpus: Sequence[Gpu]) -> bool:
    """Whether the processes of all cells may stay in memory together, and in that of a GPU."""
    if sum(map(_expected_bytes, cells)) > FREE_SHARE * free_memory_bytes():
        return False
    beside = [cell for cell in cells if cell.wanted.device not in SHARING_MEMORY and cell.alive]
    most = max((gpu.memory_bytes or 0 for gpu in gpus), default=0)
    return len(beside) < 2 or sum(map(_expected_bytes, beside)) <= FREE_SHARE * most


def _expected_bytes(cell: Running) -> int:
    """What a cell's process will take at most at about: torch and MLX hold floats on a CPU."""
    if not cell.alive:
        return 0
    wanted, facts = cell.wanted, cell.facts
    weights = facts.size_bytes
    if wanted.runtime in ("torch", "mlx") and facts.weights:
        weights = max(weights, FLOAT_BYTES * facts.weights)
    tokens = wanted.depth_tokens + wanted.batch * wanted.prompt_tokens + wanted.new_tokens
    return PROCESS_BYTES + weights + FLOAT_BYTES * (facts.kv_values or 0) * tokens
