"""What a conversion costs by family, in CPU time per byte of weights, against Llama's.

Each family has a model of random weights in about the shape of a 100M one, made with its own config
class, and the tokenizer of SmolLM2. Both sides of a pair are edgellm: the family, and Llama.
"""

from __future__ import annotations

import sys

from benchmarks.measure import folder_bytes, fresh, interleaved, run
from benchmarks.models import smollm2
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from edgellm.architectures import FAMILIES, family_named

TARGETS = {"gguf": "q4_0", "onnx": "int4-g32"}
AT_MOST_OF_LLAMA = 1.2
PAIRS = 3
BASE = "llama"


def measure(*, quick: bool) -> Result:
    """CPU seconds per GB of weights, family by family."""
    tokenizer = smollm2()
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {}
    names = ("gemma2",) if quick else tuple(name for name in FAMILIES if name != BASE)
    made = {}
    for name in (BASE, *names):
        make = [sys.executable, str(LOOPS / "family_folder.py"), name, f"family-{name}"]
        make += [tokenizer.name]
        fresh(f"family-{name}")
        run(make)
        made[name] = sum(
            file.stat().st_size for file in (WORK / f"family-{name}").glob("*.safetensors")
        )
        commands[f"{name}, made by"] = shown(make)

    def seconds_per_gb(name: str, container: str) -> float:
        convert = [*edgellm(), "convert", f"family-{name}", "--format", container, "--quant"]
        convert += [f"rtn:{TARGETS[container]}", "--out", "family-out", "--no-check", "--force"]
        commands[f"{name}, {container}"] = shown(convert)
        return run(convert).cpu_s / (made[name] / 1e9)

    for name in names:
        for container in TARGETS:
            if container == "gguf" and family_named(name).gguf is None:
                continue
            ours, llama = interleaved(
                lambda name=name, container=container: seconds_per_gb(name, container),
                lambda container=container: seconds_per_gb(BASE, container),
                pairs=1 if quick else PAIRS,
                warm_up=0,
            )
            comparisons.append(
                Comparison(
                    f"{name}, {container}", "CPU s/GB", ours, llama, at_most=AT_MOST_OF_LLAMA
                )
            )
    total = folder_bytes(WORK / f"family-{BASE}")
    return Result(
        benchmark="families",
        peer="edgellm on Llama",
        setting=(
            f"bf16 models of random weights, Llama's of {total / 1e6:.0f} MB, to "
            f"{' and '.join(f'{container} {quant}' for container, quant in TARGETS.items())}, "
            "rounded plainly and not checked; the whole command."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={"bytes": made, "packages": ["onnx", "gguf", "transformers"]},
    )
