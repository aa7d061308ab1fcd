"""A rank-16 LoRA on every linear layer of a 7B-shaped model, merged by edgellm and by PEFT.

The model is 14 GB of bfloat16 in shards, made first and removed afterwards. Both write shards of
bfloat16, bring them to the disk, and begin with none of the base in memory.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.measure import Run, folder_bytes, fresh, interleaved, output_of, run
from benchmarks.models import llama, llama_adapter
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result

WALL_RATIO = 0.5
PEAK_BYTES = 1e9
PAIRS = 2
READ_BYTES = 8 << 20
OURS, THEIRS = "7b-merged", "7b-merged-by-peft"


def measure(*, quick: bool) -> Result:
    """Wall and peak memory of both, in turn; quick: once, on two layers."""
    name = "llama7b-bf16-2-layers" if quick else "llama7b-bf16"
    model, adapter = llama(name), llama_adapter(name)
    ours = [*edgellm(), "merge", model.name, "--adapter", adapter.name, "--out", OURS]
    script = str(LOOPS / "peft_merge.py")
    theirs = [sys.executable, script, model.name, adapter.name, THEIRS]

    def warmed(command: list[str], out: str) -> Run:
        fresh(OURS, THEIRS)
        warm(model)
        done = run(command)
        sizes[out] = folder_bytes(WORK / out)
        return done

    sizes: dict[str, int] = {}
    planned: float = output_of([*ours, "--dry-run", "--json"])["peak_memory_bytes"]
    of_ours, of_theirs = interleaved(
        lambda: warmed(ours, OURS),
        lambda: warmed(theirs, THEIRS),
        pairs=1 if quick else PAIRS,
        warm_up=0,
    )
    source_bytes = folder_bytes(model)
    fresh(OURS, THEIRS)
    shutil.rmtree(model)
    shutil.rmtree(adapter)
    return Result(
        benchmark="merge_7b",
        peer="PEFT merge_and_unload + save_pretrained",
        setting=(
            "A rank-16 LoRA on all linear layers of a model of random weights in Llama-2-7B's "
            f"shape with 49,152 tokens{', two layers' if quick else ''}, bf16 safetensors. The "
            "base was read once just before, everything is on the disk at the end. Peak memory is "
            "the resident set, mapped file pages counted."
        ),
        comparisons=[
            Comparison(
                "wall",
                "s",
                [done.wall_s for done in of_ours],
                [done.wall_s for done in of_theirs],
                at_most=WALL_RATIO,
            ),
            Comparison(
                "peak memory",
                "bytes",
                [done.peak_memory_bytes for done in of_ours],
                [done.peak_memory_bytes for done in of_theirs],
            ),
            Comparison(
                "peak memory of ours",
                "bytes",
                [done.peak_memory_bytes for done in of_ours],
                at_most=PEAK_BYTES,
            ),
            Comparison("peak memory that the plan said", "bytes", [planned]),
        ],
        commands={"ours": shown(ours), "peer": shown(theirs)},
        facts={
            "source_bytes": source_bytes,
            "output_bytes": sizes,
            "packages": ["numpy", "peft", "torch", "transformers"],
        },
    )


def warm(folder: Path) -> None:
    """Read the files of ``folder`` once, so that as much as fits is in memory, for both sides."""
    os.sync()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
