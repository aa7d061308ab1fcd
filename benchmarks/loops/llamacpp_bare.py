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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def measured(context: Any, vocabulary: int, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """One round of ``count`` tokens behind ``prompt`` and the first one.

    The cache is emptied before and after.
    """

    def best_after(ids: np.ndarray) -> int:
        pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(pointer, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    def empty() -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    empty()
    ids, one = np.array(prompt, np.int32), np.zeros(1, np.int32)
    started = time.perf_counter()
    one[0] = best_after(ids)
    prefilled = time.perf_counter()
    produced = [int(one[0])]
    for _ in range(count):
        one[0] = best_after(one)
        produced.append(int(one[0]))
    ended = time.perf_counter()
    empty()
    return {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }


if __name__ == "__main__":
    path, tokens, threads, new_tokens, repack = sys.argv[1:]
    text = json.loads(Path(tokens).read_text())["prompt"]
    llama_cpp.llama_backend_init()
    loading = llama_cpp.llama_model_default_params()
    loading.use_extra_bufts = repack == "1"
    model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = len(text) + int(new_tokens) + 1
    settings.n_batch = settings.n_ubatch = len(text)
    settings.n_threads = settings.n_threads_batch = int(threads)
    made = llama_cpp.llama_init_from_model(model, settings)
    if not made:
        raise SystemExit("no context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    print(json.dumps({"device": "cpu"}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measured(made, vocabulary, text, int(new_tokens))), flush=True)
