"""llama.cpp's own quantizer, as the reference for types and bytes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
from llamacpp_logits import quiet

from edgellm.quant.grid import GRIDS


def quantize_with_llamacpp(
    source: Path, out: Path, name: str, *, embed: str | None = None, head: str | None = None
) -> bool:
    """Whether llama.cpp could make ``out`` of the float file ``source``."""
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "LLAMA_FTYPE_ALL_" if name == "f32" else "LLAMA_FTYPE_MOSTLY_"
    params.ftype = getattr(llama_cpp, prefix + name.upper())
    params.nthread = 1
    if embed:
        params.token_embedding_type = GRIDS[embed].ggml_type
    if head:
        params.output_tensor_type = GRIDS[head].ggml_type
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    return bool(code == 0)
