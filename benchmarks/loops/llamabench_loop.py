"""Speeds as llama-bench defines them: its tests pp and tg."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np


def measured(
    context: Any, vocabulary: int, prompt: Sequence[int], count: int, *, random: bool
) -> dict[str, Any]:
    """One round of both tests; the cache is empty before and after.

    Prefill: ``prompt``, or as many ``random`` tokens as llama-bench has, in one batch. Decoding:
    ``count`` random tokens one by one on an empty cache, whose logits nobody reads. Each ends when
    llama.cpp has computed (``llama_synchronize``).
    """

    def compute(ids: np.ndarray) -> None:
        pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(pointer, len(ids))):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    def seconds(batches: Sequence[np.ndarray]) -> float:
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, False)
        started = time.perf_counter()
        for batch in batches:
            compute(batch)
        took = time.perf_counter() - started
        llama_cpp.llama_memory_clear(memory, True)
        return took

    draw = np.random.default_rng()
    ids = np.array(prompt, np.int32)
    if random:
        ids = draw.integers(0, vocabulary, len(prompt), dtype=np.int32)
    steps = draw.integers(0, vocabulary, (count, 1), dtype=np.int32)
    return {
        "prefill_tokens_per_s": len(prompt) / seconds([ids]),
        "decode_tokens_per_s": count / seconds(list(steps)),
    }
