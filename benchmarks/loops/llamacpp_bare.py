"""Prefill and greedy decode through llama-cpp-python's C functions, a round for each line on stdin.

Arguments: FILE.gguf TOKENS.json THREADS NEW_TOKENS REPACK. The least that a program can do.
REPACK 0 keeps llama.cpp from rearranging weights for special instructions: AMX code that some
compilers made wrong (GCC bug 114098) crashes.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

path, tokens, threads, new_tokens, repack = sys.argv[1:]
prompt = np.array(json.loads(Path(tokens).read_text())["prompt"], np.int32)
count = int(new_tokens)

llama_cpp.llama_backend_init()
loading = llama_cpp.llama_model_default_params()
loading.use_extra_bufts = repack == "1"
model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx = len(prompt) + count + 1
settings.n_batch = settings.n_ubatch = len(prompt)
settings.n_threads = settings.n_threads_batch = int(threads)
context = llama_cpp.llama_init_from_model(model, settings)
if not context:
    raise SystemExit("no context")
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
print(json.dumps({"device": "cpu"}), flush=True)


def best_after(ids: np.ndarray) -> int:
    """The most likely token after ``ids``, which are appended to the cache."""
    pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(pointer, len(ids))):
        raise SystemExit("llama_decode failed")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())


for _ in sys.stdin:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    one = np.zeros(1, np.int32)
    started = time.perf_counter()
    one[0] = best_after(prompt)
    prefilled = time.perf_counter()
    produced = [int(one[0])]
    for _ in range(count):
        one[0] = best_after(one)
        produced.append(int(one[0]))
    ended = time.perf_counter()
    answer = {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }
    print(json.dumps(answer), flush=True)
