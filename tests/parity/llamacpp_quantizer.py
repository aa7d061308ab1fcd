"""llama.cpp's own quantizer, as the reference for types and bytes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
from llamacpp_logits import quiet

from edgellm.quant.grid import GRIDS
from edgellm.tensors import Array

CHOSEN = re.compile(r"\] +(\S+) +- \[[^\n]*?MiB -> +[0-9.]+ MiB \((\S+)\)")
"""A tensor and its type to be in the log of a dry run."""


def quantize_with_llamacpp(
    source: Path,
    out: Path,
    name: str,
    *,
    embed: str | None = None,
    head: str | None = None,
    importance: Mapping[str, Array] | None = None,
) -> bool:
    """Whether llama.cpp could make ``out`` of the float file ``source``."""
    quiet()
    params, kept = _params(name, importance)
    if embed:
        params.token_embedding_type = GRIDS[embed].ggml_type
    if head:
        params.output_tensor_type = GRIDS[head].ggml_type
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    del kept
    return bool(code == 0)


def types_of_llamacpp(
    source: Path, name: str, importance: Mapping[str, Array] | None = None
) -> dict[str, str]:
    """The type that llama.cpp chooses for each tensor it would quantize, by a dry run's log."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    params, kept = _params(name, importance)
    params.dry_run = True
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(source.with_suffix(".none")).encode(), ctypes.byref(params)
        )
    finally:
        quiet()
    del kept
    assert code == 0, "".join(lines)[-2000:]
    return {tensor: kind.lower() for tensor, kind in CHOSEN.findall("".join(lines))}


def _params(
    name: str, importance: Mapping[str, Array] | None
) -> tuple[llama_cpp.llama_model_quantize_params, object]:
    """What llama.cpp is asked for, and what must live as long."""
    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "LLAMA_FTYPE_ALL_" if name == "f32" else "LLAMA_FTYPE_MOSTLY_"
    params.ftype = getattr(llama_cpp, prefix + name.upper())
    params.nthread = 1
    if importance is None:
        return params, None
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
        entry.name = tensor.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    params.imatrix = entries
    return params, (entries, importance)
