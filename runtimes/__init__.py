"""Runtimes by name; each is imported on use. A third party adds one by the entry-point group
``edgellm.runtimes``."""

from __future__ import annotations

if __name__ != "edgellm.runtimes":
    raise ImportError("import this package as edgellm.runtimes")

RUNTIMES = {
    "llamacpp": "edgellm.runtimes.llamacpp:LlamaCppRuntime",
    "onnxruntime": "edgellm.runtimes.ort:OnnxRuntime",
    "fake": "edgellm.runtimes.fake:FakeRuntime",
}
