"""The core of what every runtime promises, tried on the machine at hand with a tiny model.

The suite of tests/runtimes runs the same checks on more models, and many more.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

import edgellm
from edgellm.artifact import Artifact
from edgellm.conversion import convert
from edgellm.errors import GenerationError, UnsupportedTarget, VerificationError
from edgellm.export import CONTAINERS
from edgellm.hardware import detect
from edgellm.recipe import Recipe
from edgellm.runtimes import ort_package, runtime_named, runtime_names
from edgellm.runtimes.limits import first_line
from edgellm.runtimes.session import Capabilities, Device, KvDtype, Logits, RunOptions, Session
from edgellm.tiny_model import write_tiny_model

Opener = Callable[[], Session]

CONTEXT_TOKENS = 96
IDS = tuple(int(token) for token in np.random.default_rng(7).integers(2, 250, 70))

BOUND = 1e-3
"""How far logits, which reach about 10, may lie apart on a CPU, by the order of float32 sums."""
BOUND_OF_HALVES = 0.3
"""Where the graph must compute in f16."""
BOUND_ELSEWHERE = 5e-2
"""On a GPU, whose products may round to fewer bits on their way (TF32)."""


class CheckFailed(VerificationError):
    """A promise that was not kept, in words."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check: ``difference`` is the largest of logits that should be equal, None where none."""

    runtime: str
    device: str
    check: str
    passed: bool
    difference: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was tried, on what: nothing in it names a person, a host or a path.

    ``skipped``: why a runtime was not tried, by its name. ``versions``: of those that were.
    """

    edgellm_version: str
    python_version: str
    system: str
    cpu: str
    physical_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    versions: dict[str, str]
    outcomes: tuple[Outcome, ...]
    skipped: dict[str, str]
    seconds: float

    @property
    def failed(self) -> int:
        return sum(not outcome.passed for outcome in self.outcomes)


def selftest(runtime: str | None = None, device: Device = "auto") -> SelfTest:
    """Try every runtime that is installed, or ``runtime``, on all its devices, or on ``device``.

    Raises ``UsageError`` for an unknown runtime, and ``UnsupportedTarget`` where nothing that was
    asked for can be tried.
    """
    started, hardware = time.perf_counter(), detect()
    names = runtime_names() if runtime is None else [runtime]
    found = [runtime_named(name).capabilities(hardware) for name in names]
    tried = [one for one in found if one.available and (runtime or one.automatic)]
    skipped = {one.runtime: one.reason for one in found if not one.available}
    places = [(one, each) for one in tried for each in one.devices if device in ("auto", each)]
    if not places:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise UnsupportedTarget(
            f"nothing to try on {device}: {reasons or 'no runtime has it here'} (edgellm doctor)"
        )
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        for capabilities, place in places:
            outcomes += bench.outcomes(capabilities, cast(Device, place))
    return SelfTest(
        edgellm_version=edgellm.__version__,
        python_version=platform.python_version(),
        system=f"{platform.system()}, {hardware.machine.value}",
        cpu=hardware.cpu.value,
        physical_cores=hardware.physical_cores.value,
        memory_bytes=hardware.memory_bytes.value,
        gpus=tuple(gpu.name for gpu in hardware.gpus.value),
        versions={one.runtime: one.version for one in tried},
        outcomes=tuple(outcomes),
        skipped=skipped,
        seconds=round(time.perf_counter() - started, 3),
    )


class Bench:
    """The tiny model in each container, made when it is first wanted, and what it should answer."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._model = write_tiny_model(scratch / "model")
        self._artifacts: dict[str, Artifact] = {}
        self._reference: Logits | None = None

    def outcomes(self, capabilities: Capabilities, device: Device) -> Iterator[Outcome]:
        """Every check of a runtime on one of its devices."""
        runtime, halves = capabilities.runtime, _in_halves(capabilities, device)
        bound = BOUND if device == "cpu" else BOUND_ELSEWHERE
        bound = BOUND_OF_HALVES if halves else bound
        for check, try_it in {**CHECKS, "the float network's logits": self._against_floats}.items():
            with ExitStack() as opened:

                def open_session(opened: ExitStack = opened) -> Session:
                    artifact = self._artifact(capabilities, halves=halves)
                    kv_dtype: KvDtype = "f16" if halves else "f32"
                    options = RunOptions(device, CONTEXT_TOKENS, kv_dtype=kv_dtype)
                    session = runtime_named(runtime).open(artifact, options)
                    return opened.enter_context(closing(session))

                try:
                    difference = try_it(open_session)
                except Exception as error:  # noqa: BLE001 -- also what should have been translated
                    yield Outcome(runtime, device, check, passed=False, reason=first_line(error))
                    continue
                passed = difference <= bound
                reason = "" if passed else f"{difference:.2g} is more than {bound:g}"
            yield Outcome(runtime, device, check, passed, difference, reason)

    def _artifact(self, capabilities: Capabilities, *, halves: bool) -> Artifact:
        container = _container(capabilities)
        name = f"{container}-f16" if halves else container
        if name not in self._artifacts:
            compute = "f16" if halves else None
            recipe = Recipe(source=str(self._model), format=container, quant="f32", compute=compute)
            self._artifacts[name] = convert(recipe, self._scratch / name, check=False)
        return self._artifacts[name]

    def _against_floats(self, open_session: Opener) -> float:
        from edgellm.answers import open_answers
        from edgellm.evaluation_text import Passage

        if self._reference is None:
            floats = open_answers(str(self._model), runtime="float")
            self._reference = next(iter(floats.logits([Passage(IDS, 0)])))
            floats.close()
        return largest(open_session().prefill(IDS, all_logits=True), self._reference)


def _in_halves(capabilities: Capabilities, device: Device) -> bool:
    """Whether the graph must compute in f16 there."""
    return _container(capabilities) == "onnx" and device in ort_package.HALVES_ON


def _container(capabilities: Capabilities) -> str:
    """What a runtime is given to open."""
    return next(name for name in CONTAINERS if name in capabilities.containers)


def largest(found: Logits, wanted: Logits) -> float:
    """The largest difference; raises ``CheckFailed`` where logits are missing or not finite."""
    if found.shape != wanted.shape:
        raise CheckFailed(f"logits of shape {list(found.shape)} instead of {list(wanted.shape)}")
    if not np.isfinite(found).all():
        raise CheckFailed("logits that are not finite")
    return float(np.abs(found - wanted).max())


def fresh(session: Session, ids: tuple[int, ...]) -> Logits:
    """Logits after ``ids``, computed at once from an empty cache."""
    session.trim(0)
    logits: Logits = session.prefill(ids)[-1].copy()
    return logits


def decoding(open_session: Opener) -> float:
    """Tokens one by one end in the same logits as all at once."""
    session = open_session()
    wanted = fresh(session, IDS)
    session.trim(0)
    session.prefill(IDS[:40])
    for token in IDS[40:]:
        logits = session.decode(token)
    return largest(logits, wanted)


def pieces(open_session: Opener) -> float:
    """A prompt in pieces ends in the same logits as in one."""
    session = open_session()
    wanted = fresh(session, IDS)
    session.trim(0)
    for start, stop in ((0, 1), (1, 33), (33, 34), (34, len(IDS))):
        logits = session.prefill(IDS[start:stop])
    return largest(logits[-1], wanted)


def positions(open_session: Opener) -> float:
    """Logits of all positions are those of each."""
    session = open_session()
    session.prefill(IDS[:3])
    rows = session.prefill(IDS[3:60], all_logits=True).copy()
    session.trim(3)
    return max(
        largest(session.decode(token), row) for row, token in zip(rows, IDS[3:60], strict=True)
    )


def trimming(open_session: Opener) -> float:
    """What was forgotten leaves no trace."""
    session = open_session()
    other = tuple(token ^ 1 for token in IDS[12:60])
    wanted = fresh(session, (*IDS[:12], *other))
    session.trim(0)
    session.prefill(IDS[:40])
    session.trim(12)
    return largest(session.prefill(other)[-1], wanted)


def restoring(open_session: Opener) -> float:
    """A saved cache goes on as if nothing had been between, in its session and in another."""
    first, second = open_session(), open_session()
    first.prefill(IDS[:30])
    state = first.save()
    wanted = first.decode(IDS[30]).copy()
    fresh(first, IDS[50:70])
    found = []
    for session in (first, second):
        session.restore(state)
        if list(session.tokens) != list(IDS[:30]):
            raise CheckFailed(f"{len(session.tokens)} tokens restored instead of 30")
        found.append(largest(session.decode(IDS[30]), wanted))
    return max(found)


def full_context(open_session: Opener) -> float:
    """Tokens that do not fit are an error that changes nothing."""
    session = open_session()
    wanted = fresh(session, IDS[:41])
    session.trim(40)
    too_many = IDS + IDS
    try:
        session.prefill(too_many)
    except GenerationError:
        return largest(session.decode(IDS[40]), wanted)
    raise CheckFailed(f"{40 + len(too_many)} tokens were taken by a context of {CONTEXT_TOKENS}")


def two_sessions(open_session: Opener) -> float:
    """Two sessions at once know nothing of each other."""
    first, second = open_session(), open_session()
    wanted = fresh(first, IDS[:20]), fresh(second, IDS[40:60])
    first.trim(0)
    second.trim(0)
    for one, other in zip(IDS[:20], IDS[40:60], strict=True):
        found = first.decode(one).copy(), second.decode(other).copy()
    return max(map(largest, found, wanted))


def closed(open_session: Opener) -> float:
    """A closed session says so, and another takes its place."""
    session = open_session()
    wanted = fresh(session, IDS[:9])
    session.close()
    try:
        session.decode(1)
    except GenerationError:
        return largest(fresh(open_session(), IDS[:9]), wanted)
    raise CheckFailed("a closed session went on computing")


CHECKS: dict[str, Callable[[Opener], float]] = {
    "token by token": decoding,
    "a prompt in pieces": pieces,
    "logits of all positions": positions,
    "forgetting": trimming,
    "save and restore": restoring,
    "a full context": full_context,
    "two sessions at once": two_sessions,
    "closing": closed,
}
"""What is tried, by its name in the table."""
