"""Profiles written by hand, with figures that tests know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from edgellm.profiling.document import (
    ArtifactFacts,
    Cell,
    Conditions,
    Distribution,
    Energy,
    Figure,
    Gauge,
    Limit,
    Memory,
    Method,
    Operator,
    Operators,
    Profile,
    Ratio,
    Roofline,
    Settings,
)

HOSTILE = "</script ><script>alert('x')</script><!--&\"|`*_\n\\"
"""A name that breaks out of HTML, of attributes, of Markdown's tables and of exposition labels."""

MODEL = "5ea1" * 16


def figure(median: float, spread: float = 0.02, rounds: int = 10) -> Figure:
    """A figure whose interval reaches ``spread`` of the median to either side."""
    samples = tuple(float(each) for each in np.linspace(1 - spread, 1 + spread, rounds) * median)
    return Figure(
        samples=samples, median=median, low=median * (1 - spread), high=median * (1 + spread)
    )


def distribution(seconds: float, rounds: int, tokens: int, seed: int = 0) -> Distribution:
    """Latencies about ``seconds`` that grow a bit with the token, and a few stalls."""
    random = np.random.default_rng(seed)
    samples = (
        seconds * (1 + 0.001 * np.arange(tokens)) * random.gamma(400, 1 / 400, (rounds, tokens))
    )
    samples[random.random((rounds, tokens)) > 0.99] *= 2.5
    flat = samples.ravel()
    p50, p90, p95, p99 = (float(each) for each in np.percentile(flat, (50, 90, 95, 99)))
    return Distribution(
        samples=tuple(map(float, flat)),
        mean=float(flat.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(flat.max()),
    )


def artifact(name: str = "small-q4_0", **changed: Any) -> ArtifactFacts:
    """An artifact; ``changed``: other values of its fields."""
    facts: dict[str, Any] = {
        "name": name,
        "container": "gguf",
        "quant": "q4_0",
        "sha256": name.encode().hex().ljust(64, "0")[:64],
        "model_sha256": MODEL,
        "size_bytes": 91_700_000,
        "weights": 134_000_000,
        "weight_bytes": 90_000_000,
        "bytes_per_token": 90_000_000,
        "kld_mean": 0.12,
    }
    return ArtifactFacts(**facts | changed)


def settings(prompt: int = 128, new: int = 32, depth: int = 0, **changed: Any) -> Settings:
    facts: dict[str, Any] = {
        "runtime": "llamacpp",
        "device": "cpu",
        "threads": 2,
        "kv_cache": "f16",
        "prompt_tokens": prompt,
        "new_tokens": new,
        "depth_tokens": depth,
    }
    return Settings(**facts | changed)


def operators() -> Operators:
    """Twelve kinds that halve from one to the next, and three layers."""
    kinds = tuple(
        Operator(name=f"kind-{n}", seconds=0.01 / 2**n, share=0.5 ** (n + 1), calls=30.0)
        for n in range(12)
    )
    layers = tuple(
        Operator(name=f"layer {n}", seconds=0.001 * (3 - n), share=0.3, calls=9.0) for n in range(3)
    )
    return Operators(
        source="ggml's own clock", tokens=16, overhead=0.08, by_kind=kinds, by_layer=layers
    )


def cell(
    name: str = "small-q4_0",
    decode: float = 40.0,
    *,
    of: ArtifactFacts | None = None,
    run: Settings | None = None,
    rounds: int = 10,
    spread: float = 0.02,
    **changed: Any,
) -> Cell:
    """A cell that wrote ``decode`` tokens/s; its other figures follow from that."""
    of, run = of or artifact(name), run or settings()
    facts: dict[str, Any] = {
        "name": name,
        "artifact": of,
        "settings": run,
        "runtime_version": "0.3.36",
        "rounds": rounds,
        "warmup_rounds": 1,
        "load_s": figure(0.31, spread, 1),
        "tokenization_s": figure(0.0004, spread, rounds),
        "time_to_first_token_s": figure(run.prompt_tokens / (decode * 8), spread, rounds),
        "prefill_tokens_per_s": figure(decode * 8, spread, rounds),
        "inter_token_latency_s": distribution(1 / decode, rounds, run.new_tokens - 1),
        "decode_tokens_per_s": figure(decode, spread, rounds),
        "end_to_end_s": figure(run.new_tokens / decode + 0.4, spread, rounds),
        "sampling_s": figure(0.00002, spread, rounds),
        "detokenization_s": figure(0.00001, spread, rounds),
        "cpu_s": figure(1.9, spread, rounds),
        "memory": Memory(
            peak_bytes=of.size_bytes + 120_000_000,
            steady_bytes=of.size_bytes + 80_000_000,
            kv_bytes=11_800_000,
        ),
        "roofline": Roofline(
            bytes_per_token=91_000_000,
            decode_share=decode * 91e6 / 12e9,
            flops_per_token=268_000_000,
            prefill_share=decode * 8 * 268e6 / 150e9,
        ),
        "operators": Operators(reason="this runtime tells no operator's time"),
        "text_sha256": "ab" * 32,
    }
    return Cell(**facts | changed)


def failed(name: str, failure: str, **changed: Any) -> Cell:
    """A cell without figures."""
    facts = {"artifact": artifact(name), "settings": settings()} | changed
    return Cell(name=name, failure=failure, **facts)


def conditions(
    cpu: str = "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", **changed: Any
) -> Conditions:
    facts: dict[str, Any] = {
        "cpu": cpu,
        "cpu_features": ("avx2", "avx512", "fma"),
        "physical_cores": 2,
        "memory_bytes": 8_200_000_000,
        "gpus": (),
        "os": "Linux 6.1",
        "python": "3.11.2",
        "versions": {"numpy": "2.3.1", "llama-cpp-python": "0.3.36"},
        "governor": "performance",
        "threads_pinned": "kept to the physical cores",
        "load_average": 0.12,
        "bandwidth_bytes_per_s": 12.1e9,
        "before": Gauge(load_average=0.12, stolen_s=10.0, busy_s=100.0, frequency_hz=2.9e9),
        "after": Gauge(load_average=1.96, stolen_s=12.0, busy_s=298.0, frequency_hz=2.8e9),
        "unknown": ("temperature: no sensor in /sys/class/thermal",),
    }
    return Conditions(**facts | changed)


def profile(cells: Iterable[Cell], **changed: Any) -> Profile:
    facts: dict[str, Any] = {
        "edgellm": "0.1.0",
        "started": "2026-03-01T14:05:09+00:00",
        "seconds": 312.4,
        "method": Method(
            command="edgellm profile small-q4_0 small-q8_0 --output profile.json",
            rounds=10,
            warmup_rounds=1,
            prompt="the first tokens of a text on lighthouses",
            not_counted=("Loading is in no other figure.", "The first round is left out."),
        ),
        "conditions": conditions(),
        "limits": (Limit(threads=2, bandwidth_bytes_per_s=12.1e9, flops_per_s=150e9),),
        "cells": tuple(cells),
    }
    return Profile(**facts | changed)


def ratio(of: str, to: str, median: float, verdict: str) -> Ratio:
    return Ratio(
        quantity="decode_tokens_per_s",
        of=of,
        to=to,
        ratio=figure(median, 0.03),
        verdict=verdict,
    )


def rich(rounds: int = 10, new: int = 32) -> Profile:
    """Three artifacts at three prompt lengths and depths; one cell noisy, one failed."""
    kinds = (("q4_0", 45.0, 92, 0.28), ("q4_k_m", 38.0, 105, 0.046), ("q8_0", 25.0, 144, 0.0021))
    cells = []
    for name, speed, megabytes, kld in kinds:
        of = artifact(
            f"smollm2-135m-{name}", quant=name, size_bytes=megabytes * 1_000_000, kld_mean=kld
        )
        for prompt, depth in ((128, 0), (512, 0), (2048, 0), (128, 2048)):
            slower = 1 - prompt / 10_000 - depth / 8_000
            told = f"{of.name} p{prompt}" + (f" d{depth}" if depth else "")
            cells.append(
                cell(
                    told,
                    speed * slower,
                    of=of,
                    run=settings(prompt, new, depth),
                    rounds=rounds,
                    operators=operators()
                    if name == "q4_0" and prompt == 512
                    else Operators(reason="not asked for"),
                )
            )
    cells[5] = msgspec.structs.replace(
        cells[5], noisy=("decode speed differs by 14 % between rounds", "3.1 % of the time stolen")
    )
    cells[-1] = failed(
        cells[-1].name,
        "the context of 2048 tokens is full: choose --context 4096",
        artifact=cells[-1].artifact,
        settings=cells[-1].settings,
    )
    names = [each.name for each in cells]
    return profile(
        cells,
        ratios=(
            ratio(names[0], names[8], 1.8, "faster"),
            ratio(names[4], names[0], 0.84, "slower"),
            ratio(names[5], names[1], 0.99, "no difference shown"),
        ),
    )


def other_machine(rounds: int = 10) -> Profile:
    """Some of the same artifacts on a slower machine."""
    kinds = (("q4_0", 12.0, 92, 0.28), ("q8_0", 7.0, 144, 0.0021))
    cells = [
        cell(
            f"smollm2-135m-{name} p{prompt}",
            speed,
            of=artifact(
                f"smollm2-135m-{name}", quant=name, size_bytes=size * 1_000_000, kld_mean=kld
            ),
            run=settings(prompt),
            rounds=rounds,
        )
        for name, speed, size, kld in kinds
        for prompt in (128, 512)
    ]
    board = conditions("ARM Cortex-A76", physical_cores=4, os="Linux 6.6", governor="ondemand")
    return profile(cells, conditions=board, started="2026-03-02T09:00:00+00:00")


def energy() -> Energy:
    return Energy(
        source="rapl package-0",
        prefill_j=figure(4.0),
        decode_j=figure(9.0),
        decode_j_per_token=figure(0.29),
    )
