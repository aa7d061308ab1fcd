"""What a machine can do at best, and how near a cell comes to it.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009): decoding is bound by how
fast memory is read, prefill by how fast numbers are multiplied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from edgellm.hardware import memory_bandwidth_bytes_per_s
from edgellm.profiling.document import ArtifactFacts, Figure, Limit, Roofline, Settings

SIDES = (512, 1024, 2048, 4096)
"""Of the square matrices that are multiplied: the first one that takes ``LEAST_S``."""

LEAST_S = 0.05
"""A product so long keeps all threads at work; starting and joining them takes microseconds."""

PRODUCTS_S = 0.3

OPSET, IR_VERSION = 21, 10
"""Of the graph that multiplies: old enough for every onnxruntime that edgellm runs on."""

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
    any case: more can do what fewer did, though another program kept one of them waiting. Threads
    that share CPUs can do no more than one on each, and are not tried.
    """
    cpus = os.cpu_count() or 1
    best: dict[int, tuple[float, float]] = {}
    bandwidth = flops = 0.0
    for count in sorted({1, *(min(each, cpus) for each in threads)}):
        bandwidth = max(bandwidth, memory_bandwidth_bytes_per_s(count))
        flops = max(flops, product_flops_per_s(count))
        best[count] = bandwidth, flops
    return tuple(
        Limit(threads=each, bandwidth_bytes_per_s=read, flops_per_s=computed)
        for each in sorted(set(threads))
        for read, computed in [best[min(each, cpus)]]
    )


def product_flops_per_s(threads: int) -> float:
    """Floating-point operations of onnxruntime's float32 matrix product in a second, at best.

    Its kernels use what the CPU has; numpy's came to half of that on one thread with AVX-512.
    """
    for side in SIDES:
        multiply = _product(side, threads)
        best_s = min(_seconds(multiply) for _ in range(2))
        if best_s >= LEAST_S:
            break
    end = time.perf_counter() + PRODUCTS_S
    while time.perf_counter() < end:
        best_s = min(best_s, _seconds(multiply))
    return 2 * side**3 / best_s


def _product(side: int, threads: int) -> Callable[[], object]:
    """What multiplies two matrices ``[side, side]`` on so many threads."""
    import onnx
    import onnxruntime

    names = ("left", "right", "product")
    infos = [onnx.helper.make_tensor_value_info(name, 1, [side, side]) for name in names]
    node = onnx.helper.make_node("MatMul", names[:2], names[2:])
    graph = onnx.helper.make_graph([node], "product", infos[:2], infos[2:])
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    matrix = np.ones((side, side), np.float32)
    return lambda: session.run(None, {"left": matrix, "right": matrix})


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
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
