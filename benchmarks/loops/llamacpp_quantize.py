"""Quantize a GGUF file with llama.cpp's own quantizer, at its default of all cores.

Arguments: IN.gguf OUT.gguf TYPE [IMATRIX.gguf [ROLE]], where TYPE is llama.cpp's name, such as
q4_k_m. With a ROLE such as ffn_down only its matrices are quantized, to the tensor type TYPE, and
all others are written in bf16.
"""

from __future__ import annotations

import ctypes
import sys

import libgguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

source, target, file_type, *imatrix = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
imatrix, role = imatrix[:1], imatrix[1:]
if role:
    # Types by name are heeded only in a file of a quantized type; the first match wins.
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    settings.token_embedding_type = settings.output_tensor_type = GGMLQuantizationType.BF16
    overrides = (llama_cpp.llama_model_tensor_override * 3)()
    overrides[0].pattern = rf"\.{role[0]}\.weight".encode()
    overrides[0].type = GGMLQuantizationType[file_type.upper()]
    overrides[1].pattern, overrides[1].type = rb"^blk\.", GGMLQuantizationType.BF16
    settings.tt_overrides = overrides
else:
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
if imatrix:
    importance = {
        name: np.ascontiguousarray(values, np.float32).reshape(-1)
        for name, values in libgguf.load_imatrix(imatrix[0]).items()
    }
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    settings.imatrix = entries
failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
raise SystemExit(failed)
