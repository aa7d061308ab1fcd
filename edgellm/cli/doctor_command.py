"""``edgellm doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import render

if TYPE_CHECKING:
    from edgellm.diagnosis import Diagnosis
    from edgellm.hardware import Gpu
    from edgellm.runtimes.session import Capabilities


def doctor(
    hardware: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What would be chosen on another machine: its doctor --json."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what this machine has and what would run here.

    Processor, cores, memory and its measured bandwidth, GPUs, each runtime with its version or the
    command that installs it, and which of them run would pick for each kind of file, and why.

    \b
    Examples:
      edgellm doctor
      edgellm doctor --hardware raspberry-pi.json
      edgellm doctor --json | jq '.runtimes[] | {runtime, available, reason}'
    """
    from edgellm.diagnosis import diagnose, read_machine

    found = diagnose(None if hardware is None else read_machine(hardware))
    if as_json:
        render.show_json(found)
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    machine = found.hardware
    cores, memory = machine.physical_cores, machine.memory_bytes
    features = " ".join(sorted(machine.cpu_features.value)) or machine.cpu_features.reason
    bandwidth = found.memory_bandwidth_bytes_per_s
    render.show_facts(
        [
            ("edgellm", f"{found.edgellm_version} on Python {found.python_version}"),
            ("system", f"{machine.os.value}, {machine.machine.value}"),
            ("processor", machine.cpu.value),
            ("features", features),
            ("cores", f"{cores.value} ({cores.reason})"),
            ("memory", f"{render.size(memory.value)} ({memory.reason})"),
            ("bandwidth", _bandwidth(bandwidth, cores.value)),
            *(("gpu", _gpu(gpu)) for gpu in machine.gpus.value),
            ("gpu", "" if machine.gpus.value else f"none found ({machine.gpus.reason})"),
            ("demo model", found.demo_model),
        ]
    )
    print()
    render.show_table(
        ("runtime", "version", "runs", "on", "keys and values in", ""),
        [_runtime(runtime) for runtime in found.runtimes],
    )
    print()
    default = f"makes {found.default_container}: {found.default_container_reason}"
    render.show_facts(
        [
            *((f"run {pick.container}", pick.reason) for pick in found.picks),
            ("convert", default),
        ]
    )


def _bandwidth(found: float | None, threads: int) -> str:
    if found is None:
        return ""
    return (
        f"{render.size(found)}/s read by {threads} threads, measured: at most {found / 100e6:.0f} "
        "tokens/s from a model of 100 MB"
    )


def _runtime(runtime: Capabilities) -> tuple[str, ...]:
    return (
        runtime.runtime,
        runtime.version if runtime.available else "-",
        " ".join(sorted(runtime.containers)),
        " ".join(runtime.devices) if runtime.available else "-",
        " ".join(runtime.kv_dtypes),
        runtime.reason + ("" if runtime.automatic else " (only by --runtime)"),
    )


def _gpu(gpu: Gpu) -> str:
    memory = f", {render.size(gpu.memory_bytes)}" if gpu.memory_bytes else ""
    capability = gpu.compute_capability
    cuda = f", compute capability {capability[0]}.{capability[1]}" if capability else ""
    return f"{gpu.name}{memory}{cuda}"
