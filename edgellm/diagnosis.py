"""What this machine has, what is installed on it, and which runtime ``run`` would pick and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import msgspec

import edgellm
from edgellm.demo_model import INSTALL as INSTALL_DEMO_MODEL
from edgellm.demo_model import find_demo_model
from edgellm.errors import EdgeError, SourceError
from edgellm.export import CONTAINERS
from edgellm.hardware import Choice, Hardware, detect, memory_bandwidth_bytes_per_s, pick
from edgellm.runtimes import best_container, capabilities_on
from edgellm.runtimes.session import Capabilities


@dataclass(frozen=True, slots=True)
class Pick:
    """What would run a container's files here: a choice, or None and the refusals in ``reason``."""

    container: str
    choice: Choice | None
    reason: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answer of ``doctor``.

    ``memory_bandwidth_bytes_per_s``: measured by threads reading at once, one for each core; a
    decoded token reads every weight once, so bandwidth by model size bounds decode tokens/s.
    None for a machine that was described by a file without it. ``default_container`` and its
    reason: what ``convert`` makes when not told.
    """

    edgellm_version: str
    python_version: str
    hardware: Hardware
    memory_bandwidth_bytes_per_s: float | None
    runtimes: tuple[Capabilities, ...]
    picks: tuple[Pick, ...]
    default_container: str
    default_container_reason: str
    demo_model: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Another machine, as ``doctor --json`` writes it there.

    Without ``runtimes`` the packages that are installed here are asked what they would do on it.
    """

    hardware: Hardware
    runtimes: tuple[Capabilities, ...] = ()
    memory_bandwidth_bytes_per_s: float | None = None


def read_machine(path: Path) -> Machine:
    """The machine that a file describes. Raises ``SourceError`` for what cannot be understood."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Machine)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SourceError(
            f"{path} does not describe a machine ({error}): write one on it with `edgellm doctor "
            "--json`"
        ) from error


def diagnose(machine: Machine | None = None) -> Diagnosis:
    """Everything found here, or what would be chosen on another ``machine``.

    Takes about half a second here, most of it to measure the memory.
    """
    if machine is None:
        hardware = detect()
        bandwidth = memory_bandwidth_bytes_per_s(hardware.physical_cores.value)
        machine = Machine(hardware, capabilities_on(hardware), bandwidth)
    hardware = machine.hardware
    found = machine.runtimes or capabilities_on(hardware)
    container, reason = best_container(found)
    model = find_demo_model()
    return Diagnosis(
        edgellm_version=edgellm.__version__,
        python_version=platform.python_version(),
        hardware=hardware,
        memory_bandwidth_bytes_per_s=machine.memory_bandwidth_bytes_per_s,
        runtimes=found,
        picks=tuple(_pick(name, hardware, found) for name in CONTAINERS),
        default_container=container,
        default_container_reason=reason,
        demo_model=str(model) if model else f"not installed: {INSTALL_DEMO_MODEL}",
    )


def _pick(container: str, hardware: Hardware, found: tuple[Capabilities, ...]) -> Pick:
    try:
        choice = pick(container, hardware, found)
    except EdgeError as refusal:
        return Pick(container, None, str(refusal))
    return Pick(container, choice, choice.reason)
