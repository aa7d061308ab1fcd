"""Quantize a GGUF file with llama.cpp's own quantizer, at its default of all cores.

Arguments: IN.gguf OUT.gguf TYPE, where TYPE is q8_0 or q4_k_m.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

FILE_TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}

source, target, file_type = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = FILE_TYPES[file_type]
failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
raise SystemExit(failed)
