"""A 7B-shaped model of random weights to GGUF: how much memory it takes, and what the plan said.

The model is 14 GB of float16 in shards, made first and removed afterwards.
"""

from __future__ import annotations

import shutil

from benchmarks.measure import folder_bytes, fresh, output_of, run
from benchmarks.models import llama
from benchmarks.places import WORK, edgellm, shown
from benchmarks.results import Comparison, Result

GRIDS = ("q8_0", "q4_k_m")
PEAK_BYTES = 700e6
HONEST = 1.1
"""How far above the plan's word the peak may go: what Python and its allocator keep varies."""


def measure(*, quick: bool) -> Result:
    """Peak memory and wall for each grid; quick: for the last alone, of two layers."""
    model = llama("llama7b-2-layers" if quick else "llama7b")
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {}
    facts: dict[str, object] = {"source_bytes": folder_bytes(model), "packages": ["libgguf"]}
    for grid in GRIDS[-1:] if quick else GRIDS:
        out = f"7b-{grid}"
        command = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", f"rtn:{grid}"]
        command += ["--out", out, "--no-check"]
        fresh(out)
        planned: float = output_of([*command, "--dry-run", "--json"])["peak_memory_bytes"]
        done = run(command)
        comparisons += [
            Comparison(
                f"{grid}, peak memory", "bytes", [done.peak_memory_bytes], at_most=PEAK_BYTES
            ),
            Comparison(f"{grid}, peak memory that the plan said", "bytes", [planned]),
            Comparison(
                f"{grid}, measured / planned",
                "",
                [done.peak_memory_bytes / planned],
                at_most=HONEST,
            ),
            Comparison(f"{grid}, wall", "s", [done.wall_s]),
        ]
        commands[grid] = shown(command)
        facts[f"{grid}_bytes"] = folder_bytes(WORK / out)
        fresh(out)
    shutil.rmtree(model)
    return Result(
        benchmark="convert_7b",
        peer="",
        setting=(
            "Random weights in Llama-2-7B's shape with 49,152 tokens, 13.8 GB of f16 safetensors "
            "in 3 shards, to GGUF. Peak memory is the resident set, mapped file pages counted."
        ),
        comparisons=comparisons,
        commands=commands,
        facts=facts,
    )
