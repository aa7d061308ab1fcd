"""Quantize a GGUF file with llama.cpp's own quantizer, at its default of all cores.

Arguments: IN.gguf OUT.gguf TYPE [IMATRIX.gguf], where TYPE is llama.cpp's name, such as q4_k_m.
"""

from __future__ import annotations

import ctypes
import sys

import libgguf
import llama_cpp
import numpy as np

source, target, file_type, *imatrix = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
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
