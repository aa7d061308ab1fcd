"""What this machine has, what is installed on it, and which runtime ``run`` would pick and why."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import edgellm
from edgellm.demo_model import INSTALL as INSTALL_DEMO_MODEL
from edgellm.demo_model import find_demo_model
from edgellm.errors import EdgeError
from edgellm.export import CONTAINERS
from edgellm.hardware import Choice, Hardware, detect, memory_bandwidth_bytes_per_s, pick
from edgellm.runtimes import best_container, runtime_named, runtime_names
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
    ``default_container`` and its reason: what ``convert`` makes when not told.
    """

    edgellm_version: str
    python_version: str
    hardware: Hardware
    memory_bandwidth_bytes_per_s: float
    runtimes: tuple[Capabilities, ...]
    picks: tuple[Pick, ...]
    default_container: str
    default_container_reason: str
    demo_model: str


def diagnose() -> Diagnosis:
    """Everything found; takes about half a second, most of it to measure the memory."""
    hardware = detect()
    found = tuple(runtime_named(name).capabilities(hardware) for name in runtime_names())
    container, reason = best_container()
    model = find_demo_model()
    return Diagnosis(
        edgellm_version=edgellm.__version__,
        python_version=platform.python_version(),
        hardware=hardware,
        memory_bandwidth_bytes_per_s=memory_bandwidth_bytes_per_s(hardware.physical_cores.value),
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
