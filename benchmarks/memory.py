"""GPTQ's peak memory for a 1B-shaped and a 3B-shaped model, against what the plan said.

The models have the shapes of Llama-3.2-1B and -3B, two layers of them and random weights: memory
follows one layer and not their number, which the third model, of four, shows. They are made first
and removed afterwards.
"""

from __future__ import annotations

import shutil

from benchmarks.measure import fresh, output_of, run
from benchmarks.models import LLAMAS, llama
from benchmarks.places import edgellm, shown
from benchmarks.results import Comparison, Result

CALIBRATION_TOKENS = 16384
MODELS = ("llama1b-2-layers", "llama1b-4-layers", "llama3b-2-layers")
HONEST = (0.85, 1.15)
"""The peak may be this part of the plan's word."""

GROWN = 1.03
"""How far four layers may take more than two: what an allocator keeps differs from run to run."""


def measure(*, quick: bool) -> Result:
    """Peak memory of each and of the plan; quick: two layers of the smaller, few tokens."""
    seen = str(2048 if quick else CALIBRATION_TOKENS)
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {}
    peaks: dict[str, int] = {}
    facts: dict[str, object] = {"packages": ["numpy", "onnxruntime"]}
    for name in MODELS[:1] if quick else MODELS:
        model = llama(name)
        command = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", "gptq:q4_k_m"]
        command += ["--calibration-tokens", seen, "--out", "rounded", "--no-check"]
        fresh("rounded")
        plan = output_of([*command, "--dry-run", "--json"])
        planned: float = plan["peak_memory_bytes"]
        done = run(command)
        fresh("rounded")
        shutil.rmtree(model)
        layer = 4.0 * LLAMAS[name].layer_weights
        peaks[name] = done.peak_memory_bytes
        facts[name] = {"calibration": plan["calibration"], "threads": plan["threads"]}
        commands[name] = shown(command)
        comparisons += [
            Comparison(f"{name}, one layer in float32", "bytes", [layer]),
            Comparison(f"{name}, peak memory that the plan said", "bytes", [planned]),
            Comparison(f"{name}, peak memory", "bytes", [done.peak_memory_bytes]),
            Comparison(
                f"{name}, measured / planned",
                "",
                [done.peak_memory_bytes / planned],
                at_least=HONEST[0],
                at_most=HONEST[1],
            ),
            Comparison(f"{name}, wall", "s", [done.wall_s]),
        ]
    if not quick:
        grown = peaks["llama1b-4-layers"] / peaks["llama1b-2-layers"]
        comparisons.append(Comparison("peak memory, four layers / two", "", [grown], at_most=GROWN))
    return Result(
        benchmark="memory",
        peer="",
        setting=(
            "Random weights in the shapes of Llama-3.2-1B and -3B, two and four of their layers, "
            "49,152 tokens of vocabulary, bf16 safetensors, by `gptq:q4_k_m` to GGUF, "
            f"{int(seen):,} tokens of calibration. Peak memory is the resident set, mapped file "
            "pages counted."
        ),
        comparisons=comparisons,
        commands=commands,
        facts=facts,
    )
