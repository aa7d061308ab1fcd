"""What a machine says of itself, from fake trees of system files, and when it was disturbed."""

from __future__ import annotations

import dataclasses
import getpass
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest

from edgellm.hardware import Fact, Gpu, Hardware, detect
from edgellm.profiling.conditions import conditions_now
from edgellm.profiling.document import Conditions, During, Gauge, Limit
from edgellm.profiling.gauges import during, gauge, noise, read_gauge
from edgellm.profiling.system_files import SystemFiles
from edgellm.profiling.virtualization import virtual_machine

CPU = "sys/devices/system/cpu/cpu{}/"
STAT = "cpu  1000 200 300 9000 50 60 70 80 500 0\ncpu0 500 100 150 4500 25 30 35 40 0 0\n"

LAPTOP = {
    "proc/loadavg": "0.52 0.41 0.30 1/300 4242\n",
    "proc/stat": STAT,
    "proc/cpuinfo": "processor : 0\ncpu MHz\t\t: 800.0\nflags\t\t: fpu avx2\n",
    **{CPU.format(cpu) + "cpufreq/scaling_cur_freq": f"{1 + cpu}000000\n" for cpu in range(4)},
    **{CPU.format(cpu) + "cpufreq/scaling_governor": "powersave\n" for cpu in range(4)},
    # Two cores of two threads each, in one package.
    **{CPU.format(cpu) + "topology/core_id": f"{cpu // 2}\n" for cpu in range(4)},
    **{CPU.format(cpu) + "topology/physical_package_id": "0\n" for cpu in range(4)},
    **{
        CPU.format(cpu) + "thermal_throttle/core_throttle_count": f"{3 + cpu // 2}\n"
        for cpu in range(4)
    },
    **{CPU.format(cpu) + "thermal_throttle/package_throttle_count": "5\n" for cpu in range(4)},
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "of no CPU\n",
    "sys/class/hwmon/hwmon0/name": "nvme\n",
    "sys/class/hwmon/hwmon0/temp1_input": "99000\n",
    "sys/class/hwmon/hwmon1/name": "coretemp\n",
    "sys/class/hwmon/hwmon1/temp1_input": "61000\n",
    "sys/class/hwmon/hwmon1/temp1_crit": "100000\n",
    "sys/class/hwmon/hwmon1/temp2_input": "64500\n",
    "sys/class/hwmon/hwmon1/temp2_crit": "95000\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "0\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/capacity": "71\n",
    "sys/class/power_supply/mouse/type": "Battery\n",
    "sys/class/power_supply/mouse/scope": "Device\n",
    "sys/class/power_supply/mouse/status": "Discharging\n",
    "sys/class/dmi/id/sys_vendor": "LENOVO\n",
    "sys/class/dmi/id/product_name": "21CB\n",
}
BOARD = {
    "proc/stat": "cpu  1000 0 300 9000 50 0 70\n",
    "sys/class/thermal/thermal_zone0/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "90000\n",
    "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "58400\n",
    "sys/class/thermal/thermal_zone1/trip_point_0_type": "active\n",
    "sys/class/thermal/thermal_zone1/trip_point_0_temp": "50000\n",
    "sys/class/thermal/thermal_zone1/trip_point_1_type": "critical\n",
    "sys/class/thermal/thermal_zone1/trip_point_1_temp": "110000\n",
    "sys/class/thermal/thermal_zone1/trip_point_2_type": "passive\n",
    "sys/class/thermal/thermal_zone1/trip_point_2_temp": "80000\n",
    "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
    "sys/class/thermal/cooling_device0/stats/total_trans": "12\n",
    "sys/class/thermal/cooling_device1/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device1/stats/total_trans": "700\n",
}

Tree = Callable[..., SystemFiles]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """``tree(files, changed={...})``: Linux with these files; None takes one away."""

    def make(files: dict[str, str], changed: dict[str, str | None] | None = None) -> SystemFiles:
        for name, content in {**files, **(changed or {})}.items():
            if content is not None:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(content)
        return SystemFiles("Linux", tmp_path / "proc", tmp_path / "sys")

    return make


def test_a_laptop_says_everything(tree: Tree) -> None:
    found, unknown = read_gauge(tree(LAPTOP))
    assert found == Gauge(
        load_average=0.52,
        stolen_s=0.80,
        # user, nice, system, irq and softirq; guests are in user already.
        busy_s=pytest.approx(16.30),
        throttled=3 + 4 + 5,  # two cores and a package
        temperature_c=64.5,
        temperature_limit_c=95.0,
        frequency_hz=2.5e9,
    )
    assert unknown == ()


def test_a_board_says_it_elsewhere(tree: Tree) -> None:
    found, unknown = read_gauge(tree(BOARD))
    assert found == Gauge(
        busy_s=pytest.approx(13.70), throttled=12, temperature_c=58.4, temperature_limit_c=80.0
    )
    assert [name.partition(":")[0] for name in unknown] == [
        "load average",
        "stolen CPU time",
        "frequency",
    ]


@pytest.mark.parametrize("content", ["", "cpu", "cpu a b c d e f g h", "\xff"])
def test_nonsense_is_unknown_and_no_error(tree: Tree, content: str) -> None:
    spoiled = dict.fromkeys((*LAPTOP, *BOARD), content)
    found, unknown = read_gauge(tree(spoiled))
    assert found == Gauge()
    assert len(unknown) == 6
    assert all(len(reason.partition(": ")[2]) > 10 for reason in unknown)


def test_directories_in_place_of_files_are_unknown(tmp_path: Path) -> None:
    for name in LAPTOP:
        (tmp_path / name).mkdir(parents=True)
    files = SystemFiles("Linux", tmp_path / "proc", tmp_path / "sys")
    assert gauge(files) == Gauge()
    assert virtual_machine(files).value == ""


@pytest.mark.parametrize("system", ["Darwin", "Windows", "Plan9"])
def test_other_systems_are_asked_through_psutil(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = SimpleNamespace(user=10.0, system=5.0, idle=100.0, interrupt=2.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=3200.0))
    files = SystemFiles(system, tmp_path, tmp_path)
    found, unknown = read_gauge(files)
    assert (found.busy_s, found.frequency_hz) == (15.0, 3.2e9)
    assert found.temperature_c is found.throttled is found.stolen_s is None
    assert any(reason.startswith("temperature:") for reason in unknown)

    def refuse() -> None:
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(psutil, "cpu_freq", refuse)
    assert gauge(files).frequency_hz is None


HARDWARE = Hardware(
    os=Fact("Linux 6.8", "test"),
    machine=Fact("x86_64", "test"),
    cpu=Fact("a CPU", "test"),
    cpu_features=Fact(frozenset({"fma", "avx2"}), "test"),
    physical_cores=Fact(2, "test"),
    memory_bytes=Fact(8 << 30, "test"),
    apple_silicon=Fact(False, "test"),
    gpus=Fact((Gpu("a GPU", "NVIDIA", 24 << 30), Gpu("another", "Intel")), "test"),
)


LIMITS = tuple(
    Limit(threads=threads, bandwidth_bytes_per_s=3e10 + threads, flops_per_s=1e11)
    for threads in (1, 2)
)


def found(files: SystemFiles, hardware: Hardware = HARDWARE) -> Conditions:
    return conditions_now(hardware, LIMITS, gauge(files), gauge(files), files=files)


def test_conditions_of_a_laptop(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 2, 5])
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    one = found(tree(LAPTOP))
    assert one.governor == "powersave"
    assert one.power_source == "battery (71 %)"
    assert one.virtual_machine == "none seen"
    assert one.threads_pinned == (
        "the process is kept to 4 of 8 CPUs (0-2, 5); OMP_PROC_BIND=close"
    )
    assert one.cpu_features == ("avx2", "fma")
    assert one.gpus == ("a GPU, 24 GiB", "another")
    assert one.load_average == one.before.load_average == 0.52
    assert one.bandwidth_bytes_per_s == 3e10 + 2
    assert one.unknown == ()


def test_pinning_is_said_where_there_is_none(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1])
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    assert found(tree(LAPTOP)).threads_pinned == "not pinned: the process may use all 2 CPUs"
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    nothing = found(tree(LAPTOP))
    assert nothing.threads_pinned == ""
    assert any(reason.startswith("pinning of threads: ") for reason in nothing.unknown)


def test_governors_that_differ(tree: Tree) -> None:
    files = tree(LAPTOP, {CPU.format(3) + "cpufreq/scaling_governor": "performance\n"})
    assert found(files).governor == "mixed: powersave (3 CPUs), performance (1 CPUs)"


@pytest.mark.parametrize(
    ("changed", "source"),
    [
        ({"AC/online": "1", "BAT0/status": "Charging"}, "mains"),
        ({"AC/online": None, "AC/type": None, "BAT0/status": "Full"}, "mains"),
        ({"BAT0/capacity": None}, "battery"),
        (dict.fromkeys(("AC/type", "AC/online", "BAT0/type"), None), ""),
    ],
)
def test_power_source(tree: Tree, changed: dict[str, str | None], source: str) -> None:
    named = {f"sys/class/power_supply/{name}": content for name, content in changed.items()}
    one = found(tree(LAPTOP, named))
    assert one.power_source == source
    assert any(reason.startswith("power source: ") for reason in one.unknown) == (not source)


@pytest.mark.parametrize(
    ("battery", "source"),
    [
        (None, "mains (no battery)"),
        (SimpleNamespace(percent=50, power_plugged=True), "mains"),
        (SimpleNamespace(percent=49.6, power_plugged=False), "battery (50 %)"),
        (SimpleNamespace(percent=50, power_plugged=None), ""),
    ],
)
def test_power_source_elsewhere(
    battery: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery)
    one = found(SystemFiles("Windows", tmp_path, tmp_path))
    assert one.power_source == source


DMI = "sys/class/dmi/id/"


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({DMI + "sys_vendor": "QEMU"}, "QEMU"),
        ({DMI + "product_name": "Standard PC", DMI + "bios_vendor": "Xen"}, "Xen"),
        ({DMI + "sys_vendor": "Microsoft Corporation"}, "none seen"),
        (
            {DMI + "sys_vendor": "Microsoft Corporation", DMI + "product_name": "Virtual Machine"},
            "Hyper-V",
        ),
        ({DMI + "sys_vendor": "Amazon EC2", DMI + "product_name": "m7i.large"}, "Amazon EC2"),
        ({DMI + "sys_vendor": "Amazon EC2", DMI + "product_name": "m7i.metal-24xl"}, "none seen"),
        ({DMI + "sys_vendor": "Amazon EC2", DMI + "product_name": "c7g.metal"}, "none seen"),
        ({"sys/hypervisor/type": "xen"}, "Xen"),
        ({"proc/device-tree/hypervisor/compatible": "linux,kvm\0"}, "linux,kvm"),
        ({"proc/cpuinfo": "flags : fpu hypervisor avx2"}, "unnamed hypervisor"),
        ({"proc/cpuinfo": "model name : no hypervisor"}, "none seen"),
        ({"proc/sys/kernel/osrelease": "5.15.0-microsoft-standard-WSL2"}, "Hyper-V (WSL)"),
    ],
)
def test_virtual_machines(tree: Tree, changed: dict[str, str | None], name: str) -> None:
    assert virtual_machine(tree(LAPTOP, changed)).value == name


def test_a_machine_that_says_nothing_is_listed(tree: Tree) -> None:
    bare = dataclasses.replace(
        HARDWARE, cpu=Fact("unknown", "no probe"), cpu_features=Fact(frozenset(), "no flags")
    )
    unknown = found(tree({"proc/nothing": ""}), bare).unknown
    assert {reason.partition(":")[0] for reason in unknown} >= {
        "governor", "power source", "virtual machine", "CPU", "features of the CPU",
        "load average", "stolen CPU time", "busy CPU time", "throttling", "temperature",
        "frequency",
    }  # fmt: skip
    assert "CPU: no probe" in unknown


def test_here_it_gives_no_names_and_no_paths() -> None:
    here = conditions_now(detect(), (), gauge(), gauge())
    assert here.bandwidth_bytes_per_s is None
    assert here.versions["numpy"] == importlib.metadata.version("numpy")
    assert here.versions["edgellm"]
    assert all(here.versions.values())
    said = msgspec.json.encode(here).decode()
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert len(private) < 4 or private not in said
    assert getpass.getuser() not in said.split()


QUIET = Gauge(stolen_s=100.0, busy_s=500.0, throttled=7, temperature_c=60, temperature_limit_c=100)


@pytest.mark.parametrize(
    ("after", "own_cpu_s", "why"),
    [
        ({}, 0.0, []),
        ({"busy_s": 518.0}, 18.0, []),
        # 20 s of CPU time in all: 1 % of it is 0.2 s, 5 % are 1 s.
        ({"stolen_s": 100.19}, 0.0, []),
        ({"stolen_s": 100.6}, 0.0, ["other virtual machines had 3.0% of the CPU time (0.60 s"]),
        ({"busy_s": 518.9}, 18.0, []),
        ({"busy_s": 520.0}, 18.0, ["other programs had 10.0% of the CPU time (2.00 s)"]),
        ({"throttled": 9}, 0.0, ["slowed down for heat (2 times)"]),
        ({"temperature_c": 94.0}, 0.0, []),
        ({"temperature_c": 96.0}, 0.0, ["was at 96 °C, and slows down at 100 °C"]),
        ({"temperature_c": 96.0, "temperature_limit_c": None}, 0.0, []),
        ({"stolen_s": None, "busy_s": None, "throttled": None, "temperature_c": None}, 0.0, []),
        ({"stolen_s": 102.0, "throttled": 8}, 0.0, ["10.0%", "(1 times)"]),
        # More of our own than was busy: two clocks that are read apart.
        ({"busy_s": 517.0}, 18.0, []),
    ],
)
def test_noise(after: dict[str, Any], own_cpu_s: float, why: list[str]) -> None:
    pair = (QUIET, msgspec.structs.replace(QUIET, **after))
    said = noise([pair], own_cpu_s=own_cpu_s, seconds=10.0, cores=2)
    assert len(said) == len(why)
    for sentence, part in zip(said, why, strict=True):
        assert part in sentence


def test_noise_is_not_the_step_of_the_clock() -> None:
    step = msgspec.structs.replace(QUIET, stolen_s=100.02, busy_s=500.03)
    assert noise([(QUIET, step)], own_cpu_s=0.0, seconds=0.1, cores=2) == ()


def test_noise_of_several_rounds_adds_up() -> None:
    """What lies between the rounds was another cell's, and does not count."""
    later = msgspec.structs.replace(QUIET, stolen_s=700.0, busy_s=900.0, temperature_c=98.0)
    pairs = [
        (QUIET, msgspec.structs.replace(QUIET, stolen_s=100.3, temperature_c=97.0)),
        (later, msgspec.structs.replace(later, stolen_s=700.3, temperature_c=60.0)),
    ]
    heat, stolen = "was at 97 °C", "3.0% of the CPU time (0.60 s stolen)"
    found = noise(pairs, own_cpu_s=0.0, seconds=10.0, cores=2)
    assert len(found) == 2
    assert stolen in found[0]
    assert heat in found[1]
    assert noise([], own_cpu_s=0.0, seconds=0.0, cores=2) == ()


def test_what_went_on_is_kept_in_figures() -> None:
    rounds = [
        (Gauge(load_average=1.0, stolen_s=5.0, busy_s=10.0, throttled=3, temperature_c=50.0),
         Gauge(load_average=2.5, stolen_s=5.5, busy_s=12.0, throttled=4, temperature_c=61.0)),
        (Gauge(load_average=2.0, stolen_s=6.0, busy_s=20.0, throttled=9, temperature_c=55.0),
         Gauge(load_average=2.0, stolen_s=6.0, busy_s=23.0, throttled=9, temperature_c=60.0)),
    ]  # fmt: skip
    found = during(rounds, own_cpu_s=4.0, seconds=5.0, cores=2)
    # 0.5 s stolen and 5 s busy, 4 of them its own, of 5 s on 2 cores; not what lay in between.
    assert found == During(
        load_average=2.5, stolen_share=0.05, others_share=0.1, throttled=1, temperature_c=61.0
    )
    assert during([(Gauge(), Gauge())], own_cpu_s=1.0, seconds=1.0, cores=1) == During()
