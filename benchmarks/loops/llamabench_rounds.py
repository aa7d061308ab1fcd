"""Speeds as llama-bench defines them (its pp and tg tests), a round for each line on stdin.

Arguments: FILE.gguf TOKENS.json|random THREADS NEW_TOKENS PROMPT_TOKENS REPACK (see
``llamacpp_bare.py``). Prefill: the text's tokens, or random ones as llama-bench has them, in one
batch on an empty cache. Decoding: random tokens one by one on an empty cache, whose logits nobody
reads. Each ends when llama.cpp has computed (``llama_synchronize``).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

path, tokens, threads, new_tokens, prompt_tokens, repack = sys.argv[1:]
count, length = int(new_tokens), int(prompt_tokens)

llama_cpp.llama_backend_init()
loading = llama_cpp.llama_model_default_params()
loading.use_extra_bufts = repack == "1"
model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx = length + count
settings.n_batch = settings.n_ubatch = length
settings.n_threads = settings.n_threads_batch = int(threads)
context = llama_cpp.llama_init_from_model(model, settings)
if not context:
    raise SystemExit("no context")
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
random = np.random.default_rng(1)
text = None
if tokens != "random":
    text = np.array(json.loads(Path(tokens).read_text())["prompt"], np.int32)[:length]
print(json.dumps({"device": "cpu"}), flush=True)


def compute(ids: np.ndarray) -> None:
    """Append ``ids`` to the cache, and wait for it."""
    pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(pointer, len(ids))):
        raise SystemExit("llama_decode failed")
    llama_cpp.llama_synchronize(context)


for _ in sys.stdin:
    prompt = random.integers(0, vocabulary, length, dtype=np.int32) if text is None else text
    steps = random.integers(0, vocabulary, (count, 1), dtype=np.int32)
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_clear(memory, False)
    started = time.perf_counter()
    compute(prompt)
    prefill_s = time.perf_counter() - started
    llama_cpp.llama_memory_clear(memory, False)
    started = time.perf_counter()
    for step in steps:
        compute(step)
    decode_s = time.perf_counter() - started
    answer = {
        "prefill_tokens_per_s": length / prefill_s,
        "decode_tokens_per_s": count / decode_s,
        "tokens": [],
    }
    print(json.dumps(answer), flush=True)
