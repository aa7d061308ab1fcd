"""Containers by name; each is imported on use. A third party adds one by the entry-point group
``edgellm.containers``."""

from __future__ import annotations

if __name__ != "edgellm.export":
    raise ImportError("import this package as edgellm.export")

CONTAINERS = {
    "gguf": "edgellm.export.to_gguf:CONTAINER",
    "onnx": "edgellm.export.to_onnx:CONTAINER",
}
