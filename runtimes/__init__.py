"""Runtimes by name; each is imported on use. A third party adds one by the entry-point group
``edgellm.runtimes``, whose objects are classes that follow ``edgellm.runtimes.session.Runtime``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "edgellm.runtimes":
    raise ImportError("import this package as edgellm.runtimes")

from edgellm import registry

if TYPE_CHECKING:
    from edgellm.runtimes.session import Runtime

ENTRY_POINTS = "edgellm.runtimes"

RUNTIMES = {
    "llamacpp": "edgellm.runtimes.llamacpp:LlamaCppRuntime",
    "onnxruntime": "edgellm.runtimes.ort:OnnxRuntime",
    "fake": "edgellm.runtimes.fake:FakeRuntime",
}


def runtime_named(name: str) -> Runtime:
    """A runtime, ready to be asked; raises ``UsageError`` with the nearest names for an unknown one."""
    runtime: Runtime = registry.load(RUNTIMES, ENTRY_POINTS, name, "runtime")()
    return runtime


def runtime_names() -> list[str]:
    """Every runtime that can be named, installed or not."""
    return registry.known_names(RUNTIMES, ENTRY_POINTS)
