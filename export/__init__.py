"""Containers by name; each is imported on use. A third party adds one by the entry-point group
``edgellm.containers``, whose objects are ``edgellm.export.layout.Container``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "edgellm.export":
    raise ImportError("import this package as edgellm.export")

from edgellm import registry

if TYPE_CHECKING:
    from edgellm.export.layout import Container

ENTRY_POINTS = "edgellm.containers"

CONTAINERS = {
    "gguf": "edgellm.export.to_gguf:CONTAINER",
    "onnx": "edgellm.export.to_onnx:CONTAINER",
    "hf": "edgellm.export.to_hf:CONTAINER",
    "mlx": "edgellm.export.to_mlx:CONTAINER",
}


def container_named(name: str) -> Container:
    """The container; raises ``UsageError`` with the nearest names for one that does not exist."""
    container: Container = registry.load(CONTAINERS, ENTRY_POINTS, name, "container")
    return container
