"""Runtimes by name; each is imported on use. A third party adds one by the entry-point group
``edgellm.runtimes``, whose objects are classes that follow ``edgellm.runtimes.session.Runtime``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if __name__ != "edgellm.runtimes":
    raise ImportError("import this package as edgellm.runtimes")

from edgellm import registry

if TYPE_CHECKING:
    from edgellm.hardware import Hardware
    from edgellm.runtimes.session import Capabilities, Runtime

ENTRY_POINTS = "edgellm.runtimes"

RUNTIMES = {
    "llamacpp": "edgellm.runtimes.llamacpp:LlamaCppRuntime",
    "onnxruntime": "edgellm.runtimes.ort:OnnxRuntime",
    "onnxruntime-genai": "edgellm.runtimes.genai:GenaiRuntime",
    "mlx": "edgellm.runtimes.mlx:MlxRuntime",
    "torch": "edgellm.runtimes.pytorch:TorchRuntime",
    "fake": "edgellm.runtimes.fake:FakeRuntime",
}


def runtime_named(name: str) -> Runtime:
    """A runtime, ready to be asked; raises ``UsageError`` with the nearest names otherwise."""
    runtime: Runtime = registry.load(RUNTIMES, ENTRY_POINTS, name, "runtime")()
    return runtime


def runtime_names() -> list[str]:
    """Every runtime that can be named, installed or not."""
    return registry.known_names(RUNTIMES, ENTRY_POINTS)


def capabilities_on(hardware: Hardware) -> tuple[Capabilities, ...]:
    """What every runtime that can be named can do on ``hardware``, with the packages of here."""
    return tuple(runtime_named(name).capabilities(hardware) for name in runtime_names())


def best_container(found: Sequence[Capabilities] | None = None) -> tuple[str, str]:
    """The container that the best of the runtimes ``found`` opens, and why it is the one.

    None: of those that are installed here.
    """
    from edgellm.export import CONTAINERS
    from edgellm.hardware import detect

    if found is None:
        found = capabilities_on(detect())
    usable = [capability for capability in found if capability.available and capability.automatic]
    for capability in sorted(usable, key=lambda capability: capability.speed_rank):
        for container in CONTAINERS:
            if container in capability.containers:
                return (
                    container,
                    f"{capability.runtime} {capability.version} is the fastest runtime here",
                )
    return "onnx", "no runtime is installed here, and onnx needs the smallest one to run"
