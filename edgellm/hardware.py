"""The machine: the only place that probes it. Each fact comes with how it is known.

``detect`` reads what the operating system says and takes a few milliseconds; nothing runs at
import. ``pick`` chooses a runtime from facts alone, so it can be tested for any machine.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from edgellm.errors import RuntimeMissing, UnsupportedTarget, UsageError

if TYPE_CHECKING:
    from edgellm.runtimes.session import Capabilities, Device

Value = TypeVar("Value")

CPU_FEATURES = {
    # what Linux, macOS (hw.optional.arm.*) and we call it
    "avx": "avx",
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "FEAT_DotProd": "dotprod",
    "i8mm": "i8mm",
    "FEAT_I8MM": "i8mm",
    "bf16": "bf16",
    "FEAT_BF16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "FEAT_SME": "sme",
    "sme": "sme",
}
WINDOWS_FEATURES = {39: "avx", 40: "avx2", 41: "avx512", 19: "neon", 43: "dotprod"}
"""``PF_*`` numbers of ``IsProcessorFeaturePresent``, from winnt.h."""

GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""PCI vendor ids."""


@dataclass(frozen=True, slots=True)
class Fact(Generic[Value]):
    """A value and how it is known."""

    value: Value
    reason: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A graphics processor; ``memory_bytes`` is None where it could not be read."""

    name: str
    vendor: str
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a machine has, as far as running models goes.

    ``physical_cores`` and ``memory_bytes`` are what this process may use: affinity and container
    limits count.
    """

    os: Fact[str]
    machine: Fact[str]
    cpu: Fact[str]
    cpu_features: Fact[frozenset[str]]
    physical_cores: Fact[int]
    memory_bytes: Fact[int]
    apple_silicon: Fact[bool]
    gpus: Fact[tuple[Gpu, ...]] = field(default=Fact((), "not looked for"))


@dataclass(frozen=True, slots=True)
class Choice:
    """The runtime and device that will run an artifact, and why."""

    runtime: str
    device: str
    reason: str


def detect() -> Hardware:
    """What this machine has. Never raises: what cannot be read is said in the fact's reason."""
    system, machine = platform.system(), platform.machine()
    apple = system == "Darwin" and machine == "arm64"
    cpu, features = detect_cpu()
    return Hardware(
        os=Fact(f"{system} {platform.release()}", "uname"),
        machine=Fact(machine, "uname"),
        cpu=cpu,
        cpu_features=features,
        physical_cores=_physical_cores(),
        memory_bytes=_memory(),
        apple_silicon=Fact(apple, f"{system} on {machine}"),
        gpus=_gpus(apple, cpu.value),
    )


def detect_cpu() -> tuple[Fact[str], Fact[frozenset[str]]]:
    """Model and features of the CPU alone, as ``detect`` says them."""
    system = platform.system()
    probe = {"Linux": _linux_cpu, "Darwin": _darwin_cpu, "Windows": _windows_cpu}.get(system)
    return probe() if probe else (Fact("unknown", f"no probe for {system}"), _no_features())


def pick(
    container: str,
    hardware: Hardware,
    capabilities: Sequence[Capabilities],
    *,
    runtime: str | None = None,
    device: Device = "auto",
    kv_dtype: str | None = None,
    adapters: bool = False,
    compute: str | None = None,
) -> Choice:
    """The runtime that runs ``container`` here: the one asked for, or the first by ``speed_rank``.

    ``kv_dtype``: what it must be able to keep past keys and values in; None for any. ``adapters``:
    whether it must be able to apply LoRA adapters beside the model. ``compute``: what its graph
    computes in (``Artifact.compute``).

    Raises ``UsageError`` for an unknown ``runtime``, ``RuntimeMissing`` when installing something
    would help, and ``UnsupportedTarget`` otherwise; the message holds every refusal.
    """
    asked = [found for found in capabilities if runtime in (None, found.runtime)]
    if not asked:
        names = ", ".join(found.runtime for found in capabilities)
        raise UsageError(f"no runtime named {runtime!r}: choose {names}")
    if runtime is None:
        asked = [found for found in asked if found.automatic]
    refusals: list[str] = []
    installs: list[str] = []
    for found in sorted(asked, key=lambda found: found.speed_rank):
        refusal = _refusal(found, container, device, kv_dtype, adapters, compute)
        if refusal is None:
            chosen = found.computing(compute)[0] if device == "auto" else device
            why = "asked for" if runtime else f"the fastest installed here that runs {container}"
            cores = hardware.physical_cores.value
            where = f"{cores} physical core{'s' * (cores != 1)}" if chosen == "cpu" else chosen
            return Choice(found.runtime, chosen, f"{why}, on {where} ({found.reason})")
        refusals.append(f"{found.runtime}: {refusal.removesuffix(f': {found.install}')}")
        helps = kv_dtype is None or kv_dtype in found.kv_dtypes
        if not found.available and container in found.containers and found.install and helps:
            installs.append(found.install)
    message = f"nothing here runs {container} files"
    message += " with adapters beside them" if adapters else ""
    message += f" with keys and values in {kv_dtype}" if kv_dtype else ""
    message += f" on {device}" if device != "auto" else ""
    message += f" ({'; '.join(refusals)})"
    if installs:
        raise RuntimeMissing(f"{message}. Install one: {' or '.join(installs)}")
    options = "--runtime, --device or --kv-cache" if kv_dtype else "--runtime or --device"
    raise UnsupportedTarget(f"{message}. Choose another {options}, or convert again")


def _refusal(
    found: Capabilities,
    container: str,
    device: str,
    kv_dtype: str | None,
    adapters: bool,
    compute: str | None,
) -> str | None:
    if container not in found.containers:
        return f"runs {', '.join(sorted(found.containers)) or 'nothing'}, not {container}"
    if not found.available:
        return found.reason
    if device != "auto" and device not in found.devices:
        return f"has {', '.join(found.devices)} here, not {device}"
    if device != "auto" and device not in found.computing(compute):
        return (
            f"computes in halves alone on {device}, and this in f32: convert it again with "
            "--compute f16"
        )
    if kv_dtype is not None and kv_dtype not in found.kv_dtypes:
        kept = ", ".join(found.kv_dtypes) or "types of its own choice"
        return f"keeps keys and values in {kept}, not {kv_dtype}"
    if adapters and not found.applies_adapters:
        return (
            "applies no adapters beside a model: merge them (convert --adapter), use gguf, or "
            "leave them out (--adapter none)"
        )
    return None


def memory_bandwidth_bytes_per_s(threads: int, *, seconds: float = 0.3) -> float:
    """Bytes that ``threads`` threads together read from memory in a second, at best.

    Each reads 128 MiB of its own, more than most caches hold, by the largest of its numbers: one
    vector instruction for each load, of integers, for floats would be looked through for NaN as
    well. Takes about ``seconds`` and ``threads`` x 128 MiB of memory, a quarter of what is free at
    most.
    """
    import numpy as np

    count = min(128 << 20, free_memory_bytes() // (4 * threads)) // 4
    buffers = [np.ones(count, np.int32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while best == 0.0 or time.perf_counter() < end:
            begun = time.perf_counter()
            list(pool.map(np.max, buffers))
            best = max(best, threads * count * 4 / (time.perf_counter() - begun))
    return best


def free_memory_bytes() -> int:
    """What this process could still take without swapping; limits of containers count."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or used is None:
        return free
    return min(free, max(0, limit - used + _cgroup_file_pages()))


CPU_PRESSURE = Path("/proc/pressure/cpu")
BUSY_PERCENT = 5.0
"""Share of the last ten seconds in which some thread waited for a CPU; our own threads, one to a
core, make it wait for none."""


def machine_is_busy() -> bool:
    """Whether threads had to wait for a CPU just now; where the kernel does not say, they had."""
    try:
        found = re.search(r"some avg10=([\d.]+)", CPU_PRESSURE.read_text())
    except OSError:  # not Linux, or a kernel without pressure accounting
        return True
    return found is None or float(found[1]) > BUSY_PERCENT


def peak_memory_bytes() -> int:
    """The most memory that this process has occupied, resident pages of mapped files counted."""
    if sys.platform == "linux":
        # ru_maxrss would count the program that started this one, which exec does not reset.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _no_features() -> Fact[frozenset[str]]:
    return Fact(frozenset(), "not known on this system")


def _linux_cpu() -> tuple[Fact[str], Fact[frozenset[str]]]:
    source = Path("/proc/cpuinfo")
    try:
        return parse_cpuinfo(source.read_text(errors="replace"))
    except OSError as error:
        return Fact("unknown", str(error)), Fact(frozenset(), str(error))


def parse_cpuinfo(text: str) -> tuple[Fact[str], Fact[frozenset[str]]]:
    """Model and features from the text of ``/proc/cpuinfo``, x86 or Arm."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    model = values.get("model name") or values.get("Model") or values.get("Hardware")
    if model is None and "CPU part" in values:
        model = f"Arm implementer {values.get('CPU implementer', '?')} part {values['CPU part']}"
    flags = (values.get("flags") or values.get("Features") or "").split()
    named = frozenset(CPU_FEATURES[flag] for flag in flags if flag in CPU_FEATURES)
    return Fact(model or "unknown", "/proc/cpuinfo"), Fact(named, "flags in /proc/cpuinfo")


def _sysctl(name: str) -> bytes | None:
    """The raw value of a macOS ``sysctl``, None where there is no such name."""
    read = ctypes.CDLL(ctypes.util.find_library("c")).sysctlbyname
    key, size, nothing = name.encode(), ctypes.c_size_t(), ctypes.c_size_t()
    if read(key, None, ctypes.byref(size), None, nothing) != 0:
        return None
    buffer = ctypes.create_string_buffer(size.value)
    if read(key, buffer, ctypes.byref(size), None, nothing) != 0:
        return None
    return buffer.raw[: size.value]


def _darwin_cpu() -> tuple[Fact[str], Fact[frozenset[str]]]:
    brand = (_sysctl("machdep.cpu.brand_string") or b"unknown").rstrip(b"\0").decode()
    found: set[str] = set()
    for flag, name in CPU_FEATURES.items():
        for key in (f"hw.optional.{flag}", f"hw.optional.arm.{flag}"):
            if int.from_bytes(_sysctl(key) or b"", "little"):
                found.add(name)
    intel = (_sysctl("machdep.cpu.leaf7_features") or b"").lower()
    found |= {"avx2"} if b"avx2" in intel.split() else set()
    return Fact(brand, "sysctl machdep.cpu"), Fact(frozenset(found), "sysctl hw.optional")


def _windows_cpu() -> tuple[Fact[str], Fact[frozenset[str]]]:
    model = platform.processor() or os.environ.get("PROCESSOR_IDENTIFIER", "unknown")
    features = _no_features()
    if sys.platform == "win32":  # tells type checkers that windll exists
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        named = frozenset(name for number, name in WINDOWS_FEATURES.items() if present(number))
        features = Fact(named, "IsProcessorFeaturePresent")
    return Fact(model, "PROCESSOR_IDENTIFIER"), features


def _physical_cores() -> Fact[int]:
    if sys.platform == "linux":
        count = len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
        quota = _cgroup_number("cpu.max")
        period = _cgroup_number("cpu.max", word=1)
        if quota and period and quota / period < count:
            return Fact(max(1, int(quota / period)), "limit of the control group (cpu.max)")
        return Fact(count, "cores of the CPUs that this process may use")
    else:  # noqa: RET505 -- so that type checkers skip it on Linux
        import psutil

        if found := psutil.cpu_count(logical=False):
            return Fact(found, "psutil")
        return Fact(os.cpu_count() or 1, "logical CPUs: psutil knew no cores")


def _core_of(cpu: int) -> str:
    # Siblings of one core read the same list here.
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_number(name: str, word: int = 0) -> int | None:
    try:
        words = Path("/sys/fs/cgroup", name).read_text().split()
    except OSError:
        return None
    return int(words[word]) if len(words) > word and words[word].isdigit() else None


def _cgroup_file_pages() -> int:
    """Pages of files that the kernel keeps as long as nobody needs the memory."""
    try:
        words = [
            line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        ]
    except OSError:
        return 0
    kinds = ("inactive_file", "active_file")
    return sum(int(line[1]) for line in words if len(line) == 2 and line[0] in kinds)


def _memory() -> Fact[int]:
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _cgroup_number("memory.max")
    if limit is not None and limit < total:
        return Fact(limit, "limit of the control group (memory.max)")
    return Fact(total, "the operating system")


def _gpus(apple: bool, cpu: str) -> Fact[tuple[Gpu, ...]]:
    if apple:
        return Fact((Gpu(f"{cpu} GPU (Metal, shares the memory)", "Apple"),), "Apple Silicon")
    nvidia = _nvidia_gpus()
    others = tuple(gpu for gpu in _drm_gpus() if gpu.vendor != "NVIDIA" or not nvidia)
    reason = "CUDA driver and /sys/class/drm" if sys.platform == "linux" else "CUDA driver"
    return Fact(nvidia + others, reason)


def _nvidia_gpus() -> tuple[Gpu, ...]:
    """GPUs that the CUDA driver lists (CUDA Driver API, device management)."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for device in range(count.value):
        title = ctypes.create_string_buffer(128)
        memory = ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetName(title, 128, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        capability = (major.value, minor.value)
        found.append(Gpu(title.value.decode(errors="replace"), "NVIDIA", memory.value, capability))
    return tuple(found)


def _drm_gpus() -> tuple[Gpu, ...]:
    found = []
    for path in sorted(Path("/sys/class/drm").glob("card[0-9]*/device/vendor")):
        if "-" in path.parts[-3]:  # a connector of a card, not a card
            continue
        try:
            vendor = GPU_VENDORS.get(path.read_text().strip())
            device = path.with_name("device").read_text().strip()
        except OSError:
            continue
        if vendor:
            found.append(Gpu(f"{vendor} device {device}", vendor))
    return tuple(found)
