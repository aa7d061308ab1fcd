"""Logits by llama.cpp's own low-level functions, so that our runtime is not what is measured."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def be_quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Swallow llama.cpp's log."""


def quiet() -> None:
    llama_cpp.llama_log_set(be_quiet, ctypes.c_void_p(0))


def logits(
    path: Path, token_ids: Sequence[int], steps: Sequence[int] = (), *, as_shipped: bool = False
) -> np.ndarray:
    """``[tokens, vocab]`` with a float32 KV cache and without flash attention.

    ``as_shipped``: with llama.cpp's own choice of both instead, as its programs have it. ``steps``:
    how many tokens are evaluated at a time; one go where it is empty. Tokens beyond their sum are
    evaluated one by one, from the cache.
    """
    quiet()
    model_params = llama_cpp.llama_model_default_params()
    # Repacked weights would not change the logits by much, but some builds' code for it is broken.
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, f"llama.cpp cannot load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256 * (1 + len(token_ids) // 256)
    params.n_threads = params.n_threads_batch = 1
    if not as_shipped:
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = False
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp made no context"
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    left = list(token_ids)
    sizes = [*steps, *[1] * (len(left) - sum(steps))] if steps else [len(left)]
    found = []
    batch = llama_cpp.llama_batch_init(len(left), 0, 1)
    try:
        done = 0
        for size in sizes:
            batch.n_tokens = size
            for index, token in enumerate(left[done : done + size]):
                batch.token[index], batch.pos[index] = token, done + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = True
            assert llama_cpp.llama_decode(context, batch) == 0
            values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (size, vocab))
            found.append(values.copy())
            done += size
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return np.concatenate(found)
