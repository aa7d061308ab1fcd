"""Energy counters of a machine: which there are, which can be read, and which one to quote.

Each counts all that its part of the machine does, of every program. Read before and after, the
difference is the energy of that time. What each leaves out:

- ``RAPL package``: CPUs with caches and memory controllers. Not memory, not the board. Linux.
- ``RAPL psys``: what the board's maker wired to it, mostly the whole board. Linux, some laptops.
- ``NVML``: NVIDIA GPUs with their memory, all of them. Not the CPU that feeds them.
- ``powermetrics``: CPU, GPU and neural engine of Apple Silicon. macOS, root only.
- ``battery``: everything, the display too, in steps of some 36 J. Linux, while it discharges.

RAPL and the battery are tested with files laid out as the kernel does, NVML and powermetrics with
stand-ins for the library and the program; none of the four was tried on such a machine yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from edgellm.errors import GenerationError
from edgellm.profiling.system_files import SystemFiles, number, text

RAPL_PACKAGE, RAPL_PSYS = "RAPL package", "RAPL psys"
NVML, POWERMETRICS, BATTERY = "NVML", "powermetrics", "battery"

QUOTED = {
    "cpu": (RAPL_PACKAGE, POWERMETRICS, RAPL_PSYS, BATTERY),
    "cuda": (NVML, BATTERY),
    "metal": (POWERMETRICS, BATTERY),
}
"""Counters by the device that computes, the best first: the least beside what computes, in the
finest steps. One that leaves the device out is none for it."""

MICROJOULES = 1e6
JOULES_IN_MICROWATTHOUR = 3600 / 1e6

BATTERY_STEP_J = 36.0
"""10 mWh, or 1 mAh at 10 V: what most gauges of batteries step by."""


class Counter(Protocol):
    """Joules since some moment. ``step_j``: the least that it can tell, None where not known."""

    @property
    def name(self) -> str: ...

    @property
    def step_j(self) -> float | None: ...

    def read_j(self) -> float:
        """Never less than before. Raises ``GenerationError`` where it cannot be read any more."""


def counters(files: SystemFiles | None = None) -> tuple[list[Counter], tuple[str, ...]]:
    """The counters that can be read, and why others that are there cannot: what would help.

    With none at all, one sentence says what was looked for.
    """
    from edgellm.profiling.energy_nvml import nvml_counter
    from edgellm.profiling.energy_powermetrics import powermetrics_counter

    files = files or SystemFiles()
    found: list[Counter] = []
    reasons: list[str] = []
    looks: tuple[Callable[[SystemFiles], Iterable[Counter | str]], ...] = (
        _rapl_counters,
        nvml_counter,
        powermetrics_counter,
        _battery_counter,
    )
    for look in looks:
        for one in look(files):
            if isinstance(one, str):
                reasons.append(one)
            else:
                found.append(one)
    if not found and not reasons:
        looked = {"Linux": "RAPL (/sys/class/powercap), NVML and a battery", "Windows": "NVML"}
        reasons.append(f"no energy counter here (looked for {looked.get(files.system, NVML)})")
    return found, tuple(reasons)


def quoted(names: Iterable[str], device: str = "cpu") -> str | None:
    """Of counters by their ``names``, the one for what ``device`` computes; None where none is.

    As ``QUOTED`` says; a device that is not there is known to the battery alone.
    """
    there = set(names)
    return next((name for name in QUOTED.get(device, (BATTERY,)) if name in there), None)


class RaplCounter:
    """Zones of Linux's power capping framework (kernel, ``power/powercap/powercap.rst``) as one.

    They wrap around, each at its ``max_energy_range_uj``: 262 kJ on many, 45 minutes at 100 W. A
    reading sees one wrap since the reading before.
    """

    step_j: float | None = 61e-6
    """2**-14 J, the usual unit (Intel SDM, volume 3, ``MSR_RAPL_POWER_UNIT``); read each ms."""

    def __init__(self, name: str, zones: Iterable[Path]) -> None:
        self.name = name
        self._zones = list(zones)
        self._ranges_uj = [int(_read(zone / "max_energy_range_uj")) for zone in self._zones]
        self._last_uj = [int(_read(zone / "energy_uj")) for zone in self._zones]
        self._total_uj = 0

    def read_j(self) -> float:
        for place, zone in enumerate(self._zones):
            try:
                now_uj = int(_read(zone / "energy_uj"))
            except (OSError, ValueError) as error:
                raise _gone(zone / "energy_uj", error) from error
            grown_uj = now_uj - self._last_uj[place]
            if grown_uj < 0:  # wrapped: the greatest value is followed by 0
                grown_uj += self._ranges_uj[place] + 1
            self._last_uj[place] = now_uj
            self._total_uj += grown_uj
        return self._total_uj / MICROJOULES


def _rapl_counters(files: SystemFiles) -> Iterable[Counter | str]:
    zones: dict[str, list[Path]] = {RAPL_PACKAGE: [], RAPL_PSYS: []}
    # Zones within zones (intel-rapl:0:0) are parts of a package, and intel-rapl-mmio is the same
    # package read in another way. Packages of AMD have these names too.
    for zone in sorted((files.sys / "class/powercap").glob("intel-rapl:*")):
        kind = text(zone / "name") or ""
        if zone.name.count(":") == 1 and kind.startswith("package"):
            zones[RAPL_PACKAGE].append(zone)
        elif kind.startswith("psys"):
            zones[RAPL_PSYS].append(zone)
    for name, places in zones.items():
        if not places:
            continue
        try:
            yield RaplCounter(name, places)
        except (OSError, ValueError) as error:
            paths = [str(zone / "energy_uj") for zone in places]
            yield (
                f"{name}: {paths[0]} cannot be read ({_why(error)}), which Linux lets root alone "
                f"do: run as root, or allow it until the next start with `sudo chmod a+r "
                f"{' '.join(paths)}`"
            )


class BatteryCounter:
    """What batteries gave since the first reading (kernel, ``sysfs-class-power``)."""

    name = BATTERY
    step_j: float | None = BATTERY_STEP_J

    def __init__(self, batteries: Iterable[Path]) -> None:
        self._batteries = list(batteries)
        self._last = [_left(battery) for battery in self._batteries]
        self._total_j = 0.0

    def read_j(self) -> float:
        for place, battery in enumerate(self._batteries):
            # One of two may be full while the other discharges.
            if text(battery / "status") == "Charging":
                raise GenerationError(
                    "the battery is being charged, so what it gives is not known: unplug the "
                    "machine and measure again"
                )
            try:
                left, unit_j = _left(battery)
            except (OSError, ValueError) as error:
                raise _gone(battery, error) from error
            # The gauge corrects itself upwards now and then.
            self._total_j += max(0.0, self._last[place][0] - left) * unit_j
            self._last[place] = left, unit_j
        return self._total_j


def _battery_counter(files: SystemFiles) -> Iterable[Counter | str]:
    batteries = sorted((files.sys / "class/power_supply").glob("BAT*"))
    if not batteries:
        return
    if not any(text(battery / "status") == "Discharging" for battery in batteries):
        yield f"{BATTERY}: it is not discharging: unplug the machine to measure by it"
        return
    try:
        yield BatteryCounter(batteries)
    except (OSError, ValueError) as error:
        yield f"{BATTERY}: {batteries[0]} does not say what is left in it ({_why(error)})"


def _left(battery: Path) -> tuple[float, float]:
    """What is left in the gauge's unit, and how many joules one of it is."""
    energy_uwh = number(battery / "energy_now")
    if energy_uwh is not None:
        return energy_uwh, JOULES_IN_MICROWATTHOUR
    charge_uah = float(_read(battery / "charge_now"))
    volts = float(_read(battery / "voltage_now")) / 1e6
    return charge_uah, JOULES_IN_MICROWATTHOUR * volts


def _read(path: Path) -> str:
    return path.read_text().strip()


def _why(error: Exception) -> str:
    return (error.strerror or "error") if isinstance(error, OSError) else "it holds no number"


def _gone(path: Path, error: Exception) -> GenerationError:
    return GenerationError(
        f"the energy counter {path} cannot be read any more ({_why(error)}): measure again"
    )
