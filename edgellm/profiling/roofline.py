"""What a machine can do at best, and how near a cell comes to it.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009): decoding is bound by how
fast memory is read, prefill by how fast numbers are multiplied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgellm.hardware import memory_bandwidth_bytes_per_s
from edgellm.profiling.document import ArtifactFacts, Figure, Limit, Roofline, Settings

SIDES = (512, 1024, 2048, 4096)
"""Of the square matrices that are multiplied: the first one that takes ``LEAST_S``."""

LEAST_S = 0.05
"""A product so long keeps all threads at work; starting and joining them takes microseconds."""

PRODUCTS_S = 0.3

KV_BITS = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q4_0": 4.5,
    "int8": 8.0,
    "int4": 4.0,
}
"""Of a number among keys and values. ggml's with their scales; others' scales are not counted, for
runtimes keep one for as many numbers as they like."""


def measure_limits(threads: Sequence[int]) -> tuple[Limit, ...]:
    """What memory and arithmetic give at best on each number of ``threads``, ascending.

    Takes about a second for each, and 128 MiB of memory for each thread. One thread is measured in
    any case: more can do what fewer did, though another program kept one of them waiting.
    """
    found = []
    bandwidth = flops = 0.0
    for count in sorted({1, *threads}):
        bandwidth = max(bandwidth, memory_bandwidth_bytes_per_s(count))
        flops = max(flops, product_flops_per_s(count))
        if count in threads:
            found.append(Limit(threads=count, bandwidth_bytes_per_s=bandwidth, flops_per_s=flops))
    return tuple(found)


def product_flops_per_s(threads: int) -> float:
    """Floating-point operations of numpy's float32 matrix product in a second, at best.

    On ``threads`` threads where numpy's library lets itself be told (Apple's Accelerate does not).
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=threads, user_api="blas"):
        for side in SIDES:
            left, right = np.ones((2, side, side), np.float32)
            product = np.empty_like(left)
            best_s = min(_product_s(left, right, product) for _ in range(2))
            if best_s >= LEAST_S:
                break
        end = time.perf_counter() + PRODUCTS_S
        while time.perf_counter() < end:
            best_s = min(best_s, _product_s(left, right, product))
    return 2 * side**3 / best_s


def _product_s(
    left: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    right: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    product: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> float:
    begun = time.perf_counter()
    np.matmul(left, right, out=product)
    return time.perf_counter() - begun


def roofline(
    facts: ArtifactFacts,
    settings: Settings,
    kv_bytes: int,
    decode: Figure | None,
    prefill: Figure | None,
    limit: Limit | None,
) -> Roofline:
    """How near a cell comes to ``limit``, that of its threads; shares are None where not known.

    ``kv_bytes``: what keys and values take, from which those of a token follow where the artifact
    does not say how many numbers they are. ``decode`` and ``prefill`` are tokens per second. A GPU
    has limits of its own, which are not measured, so it gets no shares.
    """
    bytes_per_token = None
    if facts.bytes_per_token is not None:
        bytes_per_token = facts.bytes_per_token + round(
            kv_bytes_per_token(facts, settings, kv_bytes)
        )
    flops = None if facts.prompt_weights is None else 2 * facts.prompt_weights
    bandwidth, peak = (
        (limit.bandwidth_bytes_per_s, limit.flops_per_s)
        if limit and settings.device == "cpu"
        else (None, None)
    )
    return Roofline(
        bytes_per_token=bytes_per_token,
        decode_share=_share(bytes_per_token, decode, bandwidth),
        flops_per_token=flops,
        prefill_share=_share(flops, prefill, peak),
    )


def kv_bytes_per_token(facts: ArtifactFacts, settings: Settings, kv_bytes: int) -> float:
    """Bytes of keys and values that the token in the middle of the answer reads.

    Never more than ``kv_bytes``, what all of them take.
    """
    whole = settings.depth_tokens + settings.prompt_tokens + settings.new_tokens
    tokens = whole - settings.new_tokens / 2
    bits = KV_BITS.get(settings.kv_cache)
    if facts.kv_values is None or bits is None:
        return kv_bytes * tokens / whole
    windows = facts.kv_windows or (None,)
    # Layers have as many keys and values as each other.
    seen = sum(tokens if window is None else min(tokens, window) for window in windows)
    return min(kv_bytes, facts.kv_values * bits / 8 * seen / len(windows))


def _share(needed: int | None, speed: Figure | None, best: float | None) -> float | None:
    if needed is None or speed is None or not best:
        return None
    return needed * speed.median / best
