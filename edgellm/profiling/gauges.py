"""What a machine says of itself while it is measured, and whether that disturbed the figures."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgellm.hardware import Fact
from edgellm.profiling.document import During, Gauge
from edgellm.profiling.system_files import SystemFiles, number, text

Value = TypeVar("Value")

STOLEN_SHARE = 0.01
"""Of the CPU time. Threads wait for the slowest of them, so a token loses several times the share
that one of its threads does; more than 1 % would hide differences of a few percent."""

OTHERS_SHARE = 0.05
"""Of the CPU time. The system's own services take a few percent of an idle desktop; what takes more
is a program that somebody runs."""

TICK_S = 0.01
"""Step of the kernel's CPU times (``USER_HZ`` is 100)."""

NEAR_LIMIT_C = 5.0
"""A CPU is hot where less is left until it slows down; sensors step by 1 degree, some by 5."""

CPU_SENSORS = re.compile(r"coretemp|k10temp|zenpower|.*(cpu|soc).*thermal.*|scpi_sensors")
"""Names of drivers under ``/sys/class/hwmon`` that measure CPUs: those of x86 and of Arm boards."""

CPU_ZONES = re.compile(r"x86_pkg_temp|.*(cpu|soc|cluster).*", re.IGNORECASE)
"""Types of zones under ``/sys/class/thermal`` that measure CPUs; ``acpitz`` is the board's."""

SLOWING_TRIPS = ("passive", "hot", "critical")
"""Kinds of trip points at which the kernel slows a CPU down, or stops it."""


def gauge(files: SystemFiles | None = None) -> Gauge:
    """What the machine says now. Never raises; takes some milliseconds."""
    return read_gauge(files)[0]


def read_gauge(files: SystemFiles | None = None) -> tuple[Gauge, tuple[str, ...]]:
    """The same, and a sentence for each thing that it does not say."""
    files = files or SystemFiles()
    load, (stolen, busy), frequency = _load_average(files), _cpu_seconds(files), _frequency(files)
    throttled, temperature = _throttled(files), _temperature(files)
    degrees, limit = temperature.value or (None, None)
    facts: dict[str, Fact[Any]] = {
        "load average": load,
        "stolen CPU time": stolen,
        "busy CPU time": busy,
        "throttling": throttled,
        "temperature": temperature,
        "frequency": frequency,
    }
    found = Gauge(
        load_average=load.value,
        stolen_s=stolen.value,
        busy_s=busy.value,
        throttled=throttled.value,
        temperature_c=degrees,
        temperature_limit_c=limit,
        frequency_hz=frequency.value,
    )
    return found, tuple(
        f"{name}: {fact.reason}" for name, fact in facts.items() if fact.value is None
    )


def noise(
    gauges: Sequence[tuple[Gauge, Gauge]], *, own_cpu_s: float, seconds: float, cores: int
) -> tuple[str, ...]:
    """Why what was measured between each pair of ``gauges`` may mislead; empty where quiet.

    ``own_cpu_s``: CPU time of the process that was measured, on all cores, in all stretches
    together; ``seconds``: how long they took. ``cores``: how many it could have used.
    """
    found = []
    capacity = seconds * cores
    # A counter may be a step short before, and another after.
    least = 2 * TICK_S * cores * len(gauges)
    stolen = sum(_grown(before.stolen_s, after.stolen_s) for before, after in gauges)
    if stolen > max(STOLEN_SHARE * capacity, least):
        found.append(
            f"other virtual machines had {_share(stolen, capacity)} of the CPU time "
            f"({stolen:.2f} s stolen)"
        )
    busy = sum(_grown(before.busy_s, after.busy_s) for before, after in gauges)
    others = busy - own_cpu_s
    if others > max(OTHERS_SHARE * capacity, least):
        found.append(
            f"other programs had {_share(others, capacity)} of the CPU time ({others:.2f} s)"
        )
    throttled = sum(_grown(before.throttled, after.throttled) for before, after in gauges)
    if throttled > 0:
        found.append(f"the CPU slowed down for heat ({throttled:.0f} times)")
    heats = [
        (after.temperature_c, after.temperature_limit_c)
        for _, after in gauges
        if after.temperature_c is not None and after.temperature_limit_c is not None
    ]
    hottest, limit = max(heats, key=lambda heat: heat[0] - heat[1], default=(0.0, math.inf))
    if hottest > limit - NEAR_LIMIT_C:
        found.append(f"the CPU was at {hottest:.0f} °C, and slows down at {limit:.0f} °C")
    return tuple(found)


def during(
    gauges: Sequence[tuple[Gauge, Gauge]], *, own_cpu_s: float, seconds: float, cores: int
) -> During:
    """What went on between each pair of ``gauges``; the rest as for ``noise``."""
    first, capacity = gauges[0][0], seconds * cores

    def whole(value: Callable[[Gauge], float | None]) -> float | None:
        if value(first) is None:
            return None
        return sum(_grown(value(before), value(after)) for before, after in gauges)

    def highest(value: Callable[[Gauge], float | None]) -> float | None:
        return max((found for pair in gauges for each in pair
                    if (found := value(each)) is not None), default=None)  # fmt: skip

    stolen, busy = whole(lambda each: each.stolen_s), whole(lambda each: each.busy_s)
    throttled = whole(lambda each: each.throttled)
    return During(
        load_average=highest(lambda each: each.load_average),
        stolen_share=None if stolen is None else min(1.0, stolen / capacity),
        others_share=None if busy is None else min(1.0, max(0.0, busy - own_cpu_s) / capacity),
        throttled=None if throttled is None else int(throttled),
        temperature_c=highest(lambda each: each.temperature_c),
    )


def _grown(before: float | None, after: float | None) -> float:
    return 0.0 if before is None or after is None else after - before


def _share(part: float, whole: float) -> str:
    # Counters are read before and after: of a short stretch they may hold more than all.
    return f"{min(1.0, part / whole):.1%}" if whole > 0 else "all"


def ask(question: Callable[[], Value]) -> Value | None:
    """What psutil answers; None where it has no answer on this system."""
    import psutil

    try:
        return question()
    # psutil lacks functions where a system lacks the thing, or raises what the system's call did.
    except (AttributeError, OSError, RuntimeError, psutil.Error):
        return None


def _load_average(files: SystemFiles) -> Fact[float | None]:
    if files.linux:
        words = (text(files.proc / "loadavg") or "").split()
        return Fact(_float(words[0]) if words else None, "/proc/loadavg cannot be read")
    if files.system == "Windows":  # psutil imitates one, which begins at 0
        return Fact(None, "Windows keeps none")
    found = ask(os.getloadavg)
    return Fact(found[0] if found else None, "the system does not say")


def _cpu_seconds(files: SystemFiles) -> tuple[Fact[float | None], Fact[float | None]]:
    """Stolen and busy time of all CPUs, since the machine started (``man 5 proc_stat``)."""
    if files.linux:
        reason = "/proc/stat cannot be read"
        lines = (text(files.proc / "stat") or "").splitlines()
        words = [_float(word) for word in lines[0].split()[1:]] if lines else []
        ticks = [word * TICK_S for word in words if word is not None]
        if len(ticks) < 7 or len(ticks) < len(words):
            return Fact(None, reason), Fact(None, reason)
        user, nice, system, _idle, _iowait, irq, softirq, *rest = ticks
        stolen = Fact(rest[0] if rest else None, "/proc/stat has no steal column")
        return stolen, Fact(user + nice + system + irq + softirq, "")
    import psutil

    times = ask(psutil.cpu_times)
    busy = None if times is None else times.user + times.system + getattr(times, "nice", 0.0)
    return Fact(None, f"{files.system} does not say"), Fact(busy, "psutil does not say")


def _throttled(files: SystemFiles) -> Fact[int | None]:
    if not files.linux:
        return Fact(None, f"{files.system} counts none for programs to read")
    # Siblings show their core's count, and all CPUs of a package the package's.
    counts: dict[tuple[str, ...], float] = {}
    for cpu in files.cpus():
        package = text(cpu / "topology/physical_package_id") or ""
        core = text(cpu / "topology/core_id") or cpu.name
        for kind, place in (("core", (package, core)), ("package", (package,))):
            count = number(cpu / f"thermal_throttle/{kind}_throttle_count")
            if count is not None:
                counts[kind, *place] = count
    if not counts:  # Arm: how often the kernel changed what it holds the CPUs' clocks to
        for device in (files.sys / "class/thermal").glob("cooling_device*"):
            changes = number(device / "stats/total_trans")
            if changes is not None and "cpufreq" in (text(device / "type") or ""):
                counts[(device.name,)] = changes
    if counts:
        return Fact(int(sum(counts.values())), "")
    return Fact(None, "the kernel counts none (no thermal_throttle of a CPU under /sys)")


def _temperature(files: SystemFiles) -> Fact[tuple[float, float | None] | None]:
    """The hottest sensor of the CPU, and where it slows down, in degrees Celsius."""
    if files.linux:
        found = [*_driver_temperatures(files)] or [*_zone_temperatures(files)]
        reason = "no sensor of a CPU under /sys/class/hwmon and /sys/class/thermal"
        return Fact(max(found, key=lambda one: one[0]) if found else None, reason)
    # Elsewhere psutil has no sensors: macOS keeps them to itself, Windows to drivers.
    return Fact(None, f"{files.system} shows programs no sensor")


def _driver_temperatures(files: SystemFiles) -> list[tuple[float, float | None]]:
    found = []
    for folder in sorted((files.sys / "class/hwmon").glob("hwmon*")):
        if CPU_SENSORS.fullmatch(text(folder / "name") or ""):
            for sensor in sorted(folder.glob("temp*_input")):
                crit = sensor.with_name(sensor.name.replace("_input", "_crit"))
                found.append((_degrees(sensor), _degrees(crit)))
    return [(degrees, limit) for degrees, limit in found if degrees is not None]


def _zone_temperatures(files: SystemFiles) -> list[tuple[float, float | None]]:
    found = []
    for zone in sorted((files.sys / "class/thermal").glob("thermal_zone*")):
        degrees = _degrees(zone / "temp")
        if degrees is None or not CPU_ZONES.fullmatch(text(zone / "type") or ""):
            continue
        trips = [
            _degrees(kind.with_name(kind.name.replace("_type", "_temp")))
            for kind in zone.glob("trip_point_*_type")
            if text(kind) in SLOWING_TRIPS
        ]
        found.append((degrees, min((trip for trip in trips if trip), default=None)))
    return found


def _degrees(path: Path) -> float | None:
    thousandths = number(path)
    # A sensor that is switched off says 0, or less.
    return thousandths / 1000 if thousandths is not None and thousandths > 0 else None


def _frequency(files: SystemFiles) -> Fact[float | None]:
    if files.linux:
        kilohertz = [number(cpu / "cpufreq/scaling_cur_freq") for cpu in files.cpus()]
        found = [1e3 * value for value in kilohertz if value is not None]
        if not found:
            cpuinfo = text(files.proc / "cpuinfo") or ""
            found = [1e6 * float(value) for value in re.findall(r"cpu MHz\s*:\s*([\d.]+)", cpuinfo)]
        mean = sum(found) / len(found) if found else None
        return Fact(mean, "neither /sys (cpufreq) nor /proc/cpuinfo says it")
    import psutil

    now = ask(psutil.cpu_freq)
    return Fact(1e6 * now.current if now and now.current else None, "psutil does not say")


def _float(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
