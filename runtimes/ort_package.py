"""Which of the packages that bring the module ``onnxruntime`` is here, without importing it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from edgellm.architectures.decoder import Feature
from edgellm.artifact import Artifact
from edgellm.errors import UnsupportedTarget
from edgellm.hardware import Hardware
from edgellm.runtimes.versions import installed_version

INSTALL = "pip install onnxruntime"

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""Packages that bring the module ``onnxruntime``, each its own build of it."""

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Our devices as onnxruntime names what computes on them."""

HALVES_ON = frozenset({"cuda"})
"""Devices on which the attention of our graphs (GroupQueryAttention) takes halves alone."""

UNBIASED_ON = frozenset({"cuda"})
"""Devices on which it takes no ``attention_bias`` (onnxruntime's group_query_attention.cc)."""

BUILD_FILE = Path("capi", "build_and_package_info.py")
"""Where a build says the name of its package, within the module."""


@dataclass(frozen=True, slots=True)
class OrtPackage:
    """The build that an import finds, and in ``clash`` why it may not be the one that was wanted.

    ``name`` and ``version`` are empty where there is none.
    """

    name: str = ""
    version: str = ""
    clash: str = ""

    def devices(self, hardware: Hardware) -> tuple[str, ...]:
        """What it computes on here, the first being the one to take unasked.

        CoreML comes last: it lacks the operators of our graphs, most of which then run on the CPU.
        """
        if not self.name:
            return ()
        nvidia = any(gpu.vendor == "NVIDIA" for gpu in hardware.gpus.value)
        here = {
            "cuda": self.name == "onnxruntime-gpu" and nvidia,
            "directml": self.name == "onnxruntime-directml",
            "cpu": True,
            "coreml": hardware.apple_silicon.value,
        }
        return tuple(device for device, found in here.items() if found)


def found_package() -> OrtPackage:
    """What ``import onnxruntime`` brings here."""
    module = importlib.util.find_spec("onnxruntime")
    if module is None or not module.submodule_search_locations:
        return OrtPackage()
    installed = {name: installed_version(name) for name in DISTRIBUTIONS}
    names = [name for name in installed if installed[name]]
    build = _build_name(Path(module.submodule_search_locations[0]) / BUILD_FILE)
    name = build if build in DISTRIBUTIONS else (names or ["onnxruntime"])[0]
    clash = ""
    if len(names) > 1:
        clash = (
            f"{' and '.join(names)} are both installed and overwrite each other's files; those of "
            f"{name} are there: pip uninstall -y {' '.join(names)}, then pip install {names[-1]}"
        )
    return OrtPackage(name, installed.get(name, ""), clash)


def _build_name(path: Path) -> str:
    try:
        found = re.search(r"package_name = ['\"]([\w-]+)", path.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[1] if found else ""


def check_compute(artifact: Artifact, device: str) -> None:
    """Raise ``UnsupportedTarget`` for a graph of ours that ``device`` cannot compute."""
    if device in HALVES_ON and artifact.compute == "f32":
        raise UnsupportedTarget(
            f"onnxruntime's attention on {device} takes halves alone, and {artifact.path} computes "
            "in f32: convert it again with --compute f16, or choose --device cpu"
        )
    manifest = artifact.manifest
    if device in UNBIASED_ON and manifest and Feature.ALIBI in manifest.artifact.model.features:
        raise UnsupportedTarget(
            f"onnxruntime's attention on {device} takes no bias, which {artifact.path} has "
            f"({Feature.ALIBI}): choose --device cpu, or convert it with --format gguf"
        )
