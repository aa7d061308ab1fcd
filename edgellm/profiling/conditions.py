"""On what a profile was measured, and under which circumstances, without saying whose it is.

What the hardware is comes from ``edgellm.hardware``; here is what else moves figures: versions, the
governor of the CPU's clock, the power source, a hypervisor, threads kept to cores.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import edgellm
from edgellm.hardware import Fact, Gpu, Hardware
from edgellm.profiling.document import Conditions, Gauge, Limit
from edgellm.profiling.gauges import ask, read_gauge
from edgellm.profiling.system_files import SystemFiles, number, text
from edgellm.profiling.virtualization import virtual_machine
from edgellm.runtimes.versions import installed_version

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "llama-cpp-python",
    "torch",
    "transformers",
    "mlx",
    "mlx-lm",
    "tokenizers",
)
"""Distributions whose versions change figures."""

PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables by which OpenMP keeps threads to cores."""

MAINS, BATTERY = "mains", "battery"


def conditions_now(
    hardware: Hardware,
    limits: Sequence[Limit],
    before: Gauge,
    after: Gauge,
    *,
    files: SystemFiles | None = None,
) -> Conditions:
    """The circumstances of what was measured between ``before`` and ``after``.

    ``limits``: what was measured of the memory; the most of it is the machine's bandwidth. Never
    raises: what cannot be read stands in ``unknown`` with the reason.
    """
    files = files or SystemFiles()
    found = {
        "governor": _governor(files),
        "power source": _power_source(files),
        "virtual machine": virtual_machine(files),
        "pinning of threads": _threads_pinned(),
    }
    unknown = [f"{name}: {fact.reason}" for name, fact in found.items() if not fact.value]
    if hardware.cpu.value == "unknown":
        unknown.append(f"CPU: {hardware.cpu.reason}")
    if not hardware.cpu_features.value:
        unknown.append(f"features of the CPU: {hardware.cpu_features.reason}")
    return Conditions(
        cpu=hardware.cpu.value,
        cpu_features=tuple(sorted(hardware.cpu_features.value)),
        physical_cores=hardware.physical_cores.value,
        memory_bytes=hardware.memory_bytes.value,
        gpus=tuple(_gpu(gpu) for gpu in hardware.gpus.value),
        os=hardware.os.value,
        python=platform.python_version(),
        versions=_versions(),
        governor=found["governor"].value,
        power_source=found["power source"].value,
        virtual_machine=found["virtual machine"].value,
        threads_pinned=found["pinning of threads"].value,
        load_average=before.load_average,
        bandwidth_bytes_per_s=max((limit.bandwidth_bytes_per_s for limit in limits), default=None),
        before=before,
        after=after,
        unknown=(*unknown, *read_gauge(files)[1]),
    )


def _gpu(gpu: Gpu) -> str:
    if gpu.memory_bytes is None:
        return gpu.name
    return f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB"


def _versions() -> dict[str, str]:
    versions = {"edgellm": edgellm.__version__}
    versions.update((name, installed_version(name)) for name in PACKAGES)
    return {name: version for name, version in versions.items() if version}


def _governor(files: SystemFiles) -> Fact[str]:
    """Who sets the clock of the CPUs, by the kernel's names."""
    if not files.linux:
        return Fact("", f"{files.system} names none for programs to read")
    said = [text(cpu / "cpufreq/scaling_governor") for cpu in files.cpus()]
    names = Counter(name for name in said if name)
    if not names:
        return Fact("", "the kernel does not say (no cpufreq of a CPU under /sys)")
    if len(names) == 1:
        return Fact(next(iter(names)), "")
    counts = ", ".join(f"{name} ({count} CPUs)" for name, count in names.most_common())
    return Fact(f"mixed: {counts}", "")


def _power_source(files: SystemFiles) -> Fact[str]:
    if files.linux:
        return _linux_power_source(files)
    import psutil

    battery: Any = ask(lambda: psutil.sensors_battery())
    if battery is None:
        return Fact(f"{MAINS} (no battery)", "")
    if battery.power_plugged is None:
        return Fact("", "the system does not say whether its battery is being charged")
    return Fact(MAINS if battery.power_plugged else f"{BATTERY} ({battery.percent:.0f} %)", "")


def _linux_power_source(files: SystemFiles) -> Fact[str]:
    """From ``/sys/class/power_supply`` (kernel, ``sysfs-class-power``)."""
    online, discharging, battery = [], [], False
    for supply in sorted((files.sys / "class/power_supply").glob("*")):
        kind = text(supply / "type")
        if kind in ("Mains", "USB"):
            online.append(number(supply / "online") == 1)
        elif kind == "Battery" and text(supply / "scope") != "Device":  # that of a mouse
            battery = True
            if text(supply / "status") == "Discharging":
                charge = number(supply / "capacity")
                discharging.append("" if charge is None else f" ({charge:.0f} %)")
    if any(online) or (battery and not discharging):
        return Fact(MAINS, "")
    if discharging:
        return Fact(f"{BATTERY}{discharging[0]}", "")
    return Fact("", "neither a battery nor a mains adapter is listed under /sys/class/power_supply")


def _threads_pinned() -> Fact[str]:
    import psutil

    total = psutil.cpu_count() or 1
    # macOS has no affinity, so psutil has no function for it there.
    usable = ask(lambda: psutil.Process().cpu_affinity())
    words = [f"{name}={os.environ[name]}" for name in PINNING if os.environ.get(name)]
    if usable is None:
        return Fact("; ".join(words), "the system has no affinity for programs to read")
    if len(usable) >= total:
        kept = f"not pinned: the process may use all {total} CPUs"
    else:
        kept = f"the process is kept to {len(usable)} of {total} CPUs ({_ranges(usable)})"
    return Fact("; ".join([kept, *words]), "")


def _ranges(numbers: Collection[int]) -> str:
    """``0-3, 8`` for 0, 1, 2, 3, 8."""
    found: list[list[int]] = []
    for value in sorted(numbers):
        if found and found[-1][1] == value - 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in found)
