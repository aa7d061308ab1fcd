"""Rope scaling at run time, by the settings of llama.cpp's context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgellm.architectures.rope_scaling import AskedScaling, raised_theta
from edgellm.errors import UnsupportedTarget

if TYPE_CHECKING:
    from edgellm.source.gguf_file import GgufFile

FREQUENCIES = "rope_freqs.weight"
"""A tensor whose divisors llama.cpp applies whatever its context is told."""

DEFAULT_THETA = 10000.0
"""Of llama.cpp, where a file names none."""


def set_rope(
    context_options: Any, library: Any, stored: GgufFile, asked: AskedScaling, stated: int
) -> int:
    """Set what is asked for in ``context_options``; the context that the model was trained for.

    ``stated``: the context that the file states. Raises ``UnsupportedTarget`` for what llama.cpp
    cannot be told beside the file.
    """
    metadata = stored.metadata
    arch = metadata["general.architecture"]
    again = f"convert the original again with --rope-scaling {asked}"
    if asked.kind == "llama3":
        raise UnsupportedTarget(
            f"llama.cpp takes llama3's frequencies from the file alone: {again}"
        )
    if FREQUENCIES in stored.tensors:
        raise UnsupportedTarget(
            f"the file's own rope scaling ({FREQUENCIES}) would be applied as well: {again}"
        )
    if asked.kind == "yarn" and metadata.get(f"{arch}.attention.sliding_window"):
        raise UnsupportedTarget(
            "llama.cpp would apply yarn to the layers with a window as well, whose rope is "
            "another: choose linear or ntk, or convert with --format onnx"
        )
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    trained = metadata.get(f"{arch}.rope.scaling.original_context_length", 0)
    if kind not in ("none", "yarn") or (kind == "yarn" and not trained):
        raise UnsupportedTarget(
            f"the file has {kind} rope scaling already, and does not say for how many tokens the "
            f"model was trained before: {again}"
        )
    trained = int(trained or stated)
    if asked.kind == "ntk":
        width = metadata.get(f"{arch}.rope.dimension_count") or (
            metadata[f"{arch}.embedding_length"] // metadata[f"{arch}.attention.head_count"]
        )
        theta = float(metadata.get(f"{arch}.rope.freq_base", DEFAULT_THETA))
        context_options.rope_freq_base = raised_theta(theta, int(width), asked.factor)
        context_options.rope_scaling_type = library.LLAMA_ROPE_SCALING_TYPE_NONE
    else:
        context_options.rope_freq_scale = 1 / asked.factor
        context_options.rope_scaling_type = (
            library.LLAMA_ROPE_SCALING_TYPE_YARN
            if asked.kind == "yarn"
            else library.LLAMA_ROPE_SCALING_TYPE_LINEAR
        )
        context_options.yarn_orig_ctx = trained
    return trained
