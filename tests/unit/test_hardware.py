"""Finding out what a machine has, and choosing a runtime for it."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import psutil
import pytest

from edgellm import hardware
from edgellm.errors import RuntimeMissing, UnsupportedTarget, UsageError
from edgellm.hardware import (
    Fact,
    Gpu,
    Hardware,
    detect,
    memory_bandwidth_bytes_per_s,
    parse_cpuinfo,
    peak_memory_bytes,
    pick,
)
from edgellm.runtimes.session import Capabilities

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: 13th Gen Intel(R) Core(TM) i7-1360P
flags\t\t: fpu sse2 fma avx f16c avx2 avx_vnni

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
XEON = "model name\t: Xeon\nflags\t\t: avx512f avx512_vnni amx_tile amx_int8 amx_bf16\n"
RASPBERRY_PI_5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0b
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
ARM_SERVER = "Features\t: asimd i8mm bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        (INTEL, "13th Gen Intel(R) Core(TM) i7-1360P", {"fma", "avx", "f16c", "avx2", "avx_vnni"}),
        (XEON, "Xeon", {"avx512", "avx512_vnni", "amx", "amx_int8", "amx_bf16"}),
        (RASPBERRY_PI_5, "Raspberry Pi 5 Model B Rev 1.0", {"neon", "dotprod"}),
        (ARM_SERVER, "Arm implementer 0x41 part 0xd40", {"neon", "i8mm", "bf16", "sve"}),
        ("", "unknown", set()),
    ],
)
def test_cpuinfo_is_read(text: str, model: str, features: set[str]) -> None:
    cpu, found = parse_cpuinfo(text)
    assert cpu.value == model
    assert found.value == features
    assert "/proc/cpuinfo" in found.reason


def test_every_fact_of_this_machine_has_a_reason() -> None:
    found = detect()
    for name in Hardware.__dataclass_fields__:
        assert getattr(found, name).reason, name
    assert 1 <= found.physical_cores.value <= (os.cpu_count() or 1)
    assert 0 < found.memory_bytes.value <= psutil.virtual_memory().total


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {("cpu.max", 0): 100_000, ("cpu.max", 1): 100_000, ("memory.max", 0): 1 << 30}
    monkeypatch.setattr(hardware, "_cgroup_number", lambda name, word=0: limits.get((name, word)))
    found = detect()
    assert found.memory_bytes == Fact(1 << 30, "limit of the control group (memory.max)")
    if os.name == "posix" and found.os.value.startswith("Linux"):
        assert found.physical_cores.value == 1


def test_unknown_system_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    found = detect()
    assert found.cpu == Fact("unknown", "no probe for Plan9")
    assert not found.apple_silicon.value


def test_memory_bandwidth_is_plausible() -> None:
    one = memory_bandwidth_bytes_per_s(1, seconds=0.05)
    # The slowest boards read some 1 GB/s, and nothing reads 10 TB/s.
    assert 2e8 < one < 1e13


def test_peak_memory_follows_what_was_touched() -> None:
    before = peak_memory_bytes()
    resident = psutil.Process().memory_info().rss
    block = np.ones((resident + (64 << 20)) // 8)
    after = peak_memory_bytes()
    del block
    assert before >= resident * 0.9
    assert after >= resident + (63 << 20)
    # Linux counts pages in batches by CPU, so a peak is true to some hundred kilobytes.
    assert peak_memory_bytes() >= after - (1 << 20)


def machine(gpus: tuple[Gpu, ...] = (), cores: int = 4) -> Hardware:
    return Hardware(
        os=Fact("Linux 6", "test"),
        machine=Fact("x86_64", "test"),
        cpu=Fact("a CPU", "test"),
        cpu_features=Fact(frozenset({"avx2"}), "test"),
        physical_cores=Fact(cores, "test"),
        memory_bytes=Fact(8 << 30, "test"),
        apple_silicon=Fact(False, "test"),
        gpus=Fact(gpus, "test"),
    )


GGUF = frozenset({"gguf"})
FAST = Capabilities(
    "fast", True, "fast 1.2", "1.2", "pip install fast", GGUF, ("cuda", "cpu"), speed_rank=1
)
SLOW = Capabilities(
    "slow",
    True,
    "slow 3",
    "3",
    "pip install slow",
    frozenset({"gguf", "onnx"}),
    ("cpu",),
    speed_rank=2,
)
MISSING = Capabilities(
    "missing", False, "missing is not installed: pip install missing",
    install="pip install missing", containers=GGUF, devices=("cpu",), speed_rank=0,
)  # fmt: skip
TOY = Capabilities("toy", True, "a toy", "1", "", GGUF, ("cpu",), automatic=False)


@pytest.mark.parametrize(
    ("container", "capabilities", "options", "runtime", "device"),
    [
        ("gguf", [SLOW, FAST, TOY], {}, "fast", "cuda"),
        ("gguf", [SLOW, FAST], {"device": "cpu"}, "fast", "cpu"),
        ("gguf", [SLOW, FAST], {"runtime": "slow"}, "slow", "cpu"),
        ("gguf", [MISSING, SLOW], {}, "slow", "cpu"),
        ("onnx", [FAST, SLOW], {}, "slow", "cpu"),
        ("gguf", [FAST, TOY], {"runtime": "toy"}, "toy", "cpu"),
    ],
)
def test_pick_takes_the_fastest_that_can(
    container: str,
    capabilities: list[Capabilities],
    options: dict[str, str],
    runtime: str,
    device: str,
) -> None:
    choice = pick(container, machine(), capabilities, **options)  # type: ignore[arg-type]
    assert (choice.runtime, choice.device) == (runtime, device)
    assert ("asked for" in choice.reason) == ("runtime" in options)
    (found,) = [one for one in capabilities if one.runtime == runtime]
    assert found.reason in choice.reason


def test_pick_says_how_many_cores() -> None:
    assert "on 1 physical core (" in pick("onnx", machine(cores=1), [SLOW]).reason
    assert "on 4 physical cores (" in pick("onnx", machine(), [SLOW]).reason


def test_pick_names_every_refusal_and_what_to_install() -> None:
    with pytest.raises(RuntimeMissing) as error:
        pick("gguf", machine(), [MISSING, TOY])
    assert "missing: missing is not installed" in str(error.value)
    assert "Install one: pip install missing" in str(error.value)
    assert str(error.value).count("pip install missing") == 1

    with pytest.raises(UnsupportedTarget) as refused:
        pick("onnx", machine(), [FAST, MISSING, TOY])
    assert "fast: runs gguf, not onnx" in str(refused.value)
    assert "missing: runs gguf, not onnx" in str(refused.value)

    with pytest.raises(UnsupportedTarget, match="slow: has cpu here, not metal"):
        pick("gguf", machine(), [SLOW], device="metal")


def test_a_cache_that_the_runtime_cannot_keep_is_a_refusal() -> None:
    runtime = dataclasses.replace(SLOW, kv_dtypes=("f32", "f16"))
    assert pick("gguf", machine(), [runtime], kv_dtype="f16").runtime == runtime.runtime
    with pytest.raises(UnsupportedTarget, match="keeps keys and values in f32, f16, not int8"):
        pick("gguf", machine(), [runtime], kv_dtype="int8")


def test_pick_refuses_a_runtime_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="no runtime named 'quick': choose fast, slow"):
        pick("gguf", machine(), [FAST, SLOW], runtime="quick")


def test_a_graph_in_floats_goes_to_the_cpu_where_a_gpu_takes_halves_alone() -> None:
    found = Capabilities(
        "ort", True, "here", containers=frozenset({"onnx"}), devices=("cuda", "cpu"),
        halves_only=frozenset({"cuda"}),
    )  # fmt: skip
    here = detect()
    assert pick("onnx", here, [found], compute="f32").device == "cpu"
    assert pick("onnx", here, [found], compute="f16").device == "cuda"
    assert pick("onnx", here, [found]).device == "cuda"
    with pytest.raises(UnsupportedTarget, match=r"halves alone on cuda.*--compute f16"):
        pick("onnx", here, [found], compute="f32", device="cuda")
