"""Energy counters, on files as Linux lays them out and on stand-ins for what is not here."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm.errors import GenerationError
from edgellm.profiling import device_memory, energy_nvml
from edgellm.profiling.energy import counters, quoted
from edgellm.profiling.energy_nvml import NvmlCounter, nvml_counter
from edgellm.profiling.energy_powermetrics import PowermetricsCounter, powermetrics_counter
from edgellm.profiling.system_files import SystemFiles

RANGE_UJ = 262_143_328_850

Write = Callable[[str, object], None]


@pytest.fixture
def files(tmp_path: Path) -> SystemFiles:
    """Linux without any counter; ``write`` adds to it."""
    return SystemFiles("Linux", tmp_path / "proc", tmp_path / "sys")


@pytest.fixture(autouse=True)
def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No counter of the machine that runs the tests."""
    monkeypatch.setattr(energy_nvml, "LIBRARIES", {})


@pytest.fixture
def write(files: SystemFiles) -> Write:
    def put(name: str, content: object) -> None:
        path = files.sys / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")

    return put


def zone(write: Write, place: str, name: str, energy_uj: int) -> None:
    write(f"powercap/{place}/name", name)
    write(f"powercap/{place}/energy_uj", energy_uj)
    write(f"powercap/{place}/max_energy_range_uj", RANGE_UJ)


def test_packages_are_added_and_their_parts_are_not(files: SystemFiles, write: Write) -> None:
    zone(write, "intel-rapl:0", "package-0", 1_000_000)
    zone(write, "intel-rapl:0:0", "core", 400_000)
    zone(write, "intel-rapl:0:1", "package-0-odd", 400_000)
    zone(write, "intel-rapl:1", "package-1", 7_000_000)
    zone(write, "intel-rapl:2", "psys", 500_000)
    zone(write, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (package, psys), reasons = counters(files)
    assert (package.name, psys.name, reasons) == ("RAPL package", "RAPL psys", ())
    assert package.read_j() == 0
    for place in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl-mmio:0"):
        write(f"powercap/{place}/energy_uj", 3_500_000)
    write("powercap/intel-rapl:1/energy_uj", 8_000_000)
    assert package.read_j() == pytest.approx(2.5 + 1.0)
    assert package.read_j() == pytest.approx(3.5)
    assert psys.read_j() == 0


def test_a_counter_that_wraps_around_goes_on(files: SystemFiles, write: Write) -> None:
    zone(write, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    (counter,), _ = counters(files)
    read = [counter.read_j()]
    for energy_uj in (RANGE_UJ, 0, 3_000_000, RANGE_UJ - 1_000_000, 1_000_000):
        write("powercap/intel-rapl:0/energy_uj", energy_uj)
        read.append(counter.read_j())
    lap = RANGE_UJ / 1e6
    assert read == pytest.approx([0, 2, 2, 5, lap + 1, lap + 3], abs=1e-5)
    assert read == sorted(read)


def test_a_counter_that_may_not_be_read_says_what_would_help(
    files: SystemFiles, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(write, "intel-rapl:0", "package-0", 1)
    allowed = Path.read_text

    def denied(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    found, (reason,) = counters(files)
    place = files.sys / "class/powercap/intel-rapl:0/energy_uj"
    assert found == []
    assert f"{place} cannot be read (Permission denied)" in reason
    assert f"sudo chmod a+r {place}" in reason


def test_a_counter_that_goes_away_or_holds_nonsense_is_an_error(
    files: SystemFiles, write: Write
) -> None:
    zone(write, "intel-rapl:0", "package-0", 1)
    (counter,), _ = counters(files)
    write("powercap/intel-rapl:0/energy_uj", "much")
    with pytest.raises(GenerationError, match="holds no number"):
        counter.read_j()
    (files.sys / "class/powercap/intel-rapl:0/energy_uj").unlink()
    with pytest.raises(GenerationError, match="No such file"):
        counter.read_j()
    found, (reason,) = counters(files)
    assert found == []
    assert "No such file" in reason


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [
        ({"energy_now": 50_000_000}, {"energy_now": 49_990_000}, 36.0),
        (
            {"charge_now": 4_000_000, "voltage_now": 12_000_000},
            {"charge_now": 3_999_000, "voltage_now": 11_900_000},
            0.001 * 11.9 * 3600,
        ),
        ({"energy_now": 50_000_000}, {"energy_now": 50_010_000}, 0.0),  # the gauge's correction
    ],
)
def test_battery(
    files: SystemFiles,
    write: Write,
    before: dict[str, int],
    after: dict[str, int],
    joules: float,
) -> None:
    for name, value in {"status": "Discharging", **before}.items():
        write(f"power_supply/BAT0/{name}", value)
    (counter,), reasons = counters(files)
    assert (counter.name, counter.step_j, reasons) == ("battery", 36.0, ())
    assert counter.read_j() == 0
    for name, value in after.items():
        write(f"power_supply/BAT0/{name}", value)
    assert counter.read_j() == pytest.approx(joules)
    write("power_supply/BAT0/status", "Charging")
    with pytest.raises(GenerationError, match="unplug"):
        counter.read_j()
    found, (reason,) = counters(files)
    assert found == []
    assert "unplug" in reason


def test_a_battery_that_says_nothing(files: SystemFiles, write: Write) -> None:
    write("power_supply/BAT0/status", "Discharging")
    found, (reason,) = counters(files)
    assert found == []
    assert "does not say what is left" in reason


def nvml(energies_mj: list[int], code: int = 0) -> Any:
    """What ctypes would load: functions that write where they are told to and return a code."""

    def count(reference: Any) -> int:
        reference._obj.value = len(energies_mj)
        return 0

    def handle(index: int, reference: Any) -> int:
        reference._obj.value = index + 1
        return 0

    def energy(device: ctypes.c_void_p, reference: Any) -> int:
        assert device.value
        reference._obj.value = energies_mj[device.value - 1]
        return code

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetCount_v2=count,
        nvmlDeviceGetHandleByIndex_v2=handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_nvml(files: SystemFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_nvml, "LIBRARIES", {"Linux": "libnvidia-ml.so.1"})
    energies_mj = [2**40, 500]
    (counter,) = nvml_counter(files, lambda name: nvml(energies_mj))
    assert isinstance(counter, NvmlCounter)
    before = counter.read_j()
    energies_mj[0] += 2_000
    energies_mj[1] += 500
    assert counter.read_j() - before == pytest.approx(2.5)

    (old,) = nvml_counter(files, lambda name: nvml([1], code=3))
    assert "before Volta" in str(old)
    (refused,) = nvml_counter(files, lambda name: nvml([1], code=4))
    assert "root" in str(refused)
    asleep = SimpleNamespace(nvmlInit_v2=lambda: 9)
    assert "error 9" in str(*nvml_counter(files, lambda name: asleep))

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    assert [*nvml_counter(files, absent)] == []
    assert [*nvml_counter(files, lambda name: nvml([]))] == []


def test_memory_of_gpus_is_that_of_the_process(
    files: SystemFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "LIBRARIES", {"Linux": "libnvidia-ml.so.1"})
    unknown = device_memory.NOT_AVAILABLE
    others = [(1000 + each, 1) for each in range(80)]  # more than the first table has rows
    on_gpus = [[(7, 3 << 30), (8, 1 << 30)], [*others, (7, 5 << 20)], [(9, unknown)]]

    def processes(device: ctypes.c_void_p, count: Any, table: Any) -> int:
        assert device.value
        there = on_gpus[device.value - 1]
        room, count._obj.value = count._obj.value, len(there)
        if room < len(there):
            return device_memory.TOO_SMALL
        for row, (table[row].pid, table[row].usedGpuMemory) in enumerate(there):  # noqa: B007
            pass
        return 0

    library = nvml([1, 1, 1])
    library.nvmlDeviceGetComputeRunningProcesses_v3 = processes
    assert device_memory.nvml_bytes(files, 7, lambda name: library) == (3 << 30) + (5 << 20)
    assert device_memory.nvml_bytes(files, 8, lambda name: library) == 1 << 30
    assert device_memory.nvml_bytes(files, 9, lambda name: library) is None, "it does not say"
    assert device_memory.nvml_bytes(files, 10, lambda name: library) is None, "no such process"
    library.nvmlInit_v2 = lambda: 9
    assert device_memory.nvml_bytes(files, 7, lambda name: library) is None


SAMPLES = """
*** Sampled system activity (Fri Jan  2 10:00:00 2026 +0100) (200.00ms elapsed) ***

CPU Power: 4000 mW
GPU Power: 50 mW
Combined Power (CPU + GPU + ANE): 4050 mW
*** Sampled system activity (Fri Jan  2 10:00:00 2026 +0100) (400.00ms elapsed) ***
Combined Power (CPU + GPU + ANE): 1000 mW
"""


def test_powermetrics(files: SystemFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import time; print({SAMPLES!r}, flush=True); time.sleep(60)"
    counter = PowermetricsCounter([sys.executable, "-c", code])
    try:
        assert counter.read_j() == 0
        end = time.monotonic() + 20
        while counter.read_j() < 1.2 and time.monotonic() < end:
            time.sleep(0.01)
        assert counter.read_j() == pytest.approx(0.2 * 4.05 + 0.4 * 1.0)
    finally:
        counter.close()
    with pytest.raises(GenerationError, match="ended by itself"):
        counter.read_j()
    with pytest.raises(GenerationError, match="cannot be started"):
        PowermetricsCounter(["/no/such/program"]).read_j()

    mac = SystemFiles("Darwin", files.proc, files.sys)
    monkeypatch.setattr(os, "geteuid", lambda: 501, raising=False)
    (reason,) = powermetrics_counter(mac)
    assert "sudo" in str(reason)
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert isinstance(*powermetrics_counter(mac), PowermetricsCounter)
    assert [*powermetrics_counter(files)] == []


def test_a_machine_without_counters_says_what_was_looked_for(files: SystemFiles) -> None:
    found, (reason,) = counters(files)
    assert found == []
    assert "powercap" in reason


@pytest.mark.parametrize(
    ("names", "device", "name"),
    [
        (["battery", "RAPL psys", "RAPL package", "NVML"], "cpu", "RAPL package"),
        (["battery", "RAPL psys"], "cpu", "RAPL psys"),
        (["NVML"], "cpu", None),
        (["NVML", "RAPL package"], "cuda", "NVML"),
        (["RAPL package"], "cuda", None),
        (["powermetrics", "battery"], "metal", "powermetrics"),
        (["RAPL package", "battery"], "another", "battery"),
        ([], "cpu", None),
    ],
)
def test_which_is_quoted(names: list[str], device: str, name: str | None) -> None:
    assert quoted(names, device) == name
