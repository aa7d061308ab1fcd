"""Adapters on a real model: what rounding leaves of them, and one by llama.cpp's own way.

Survival is as `edgellm convert` measures it: 1 - KL(merged || quantized) / KL(merged || base) on
its built-in text. The other figure is the mean KL divergence from PEFT's answers (float32, adapter
unmerged) to llama.cpp's with the base in f16 and the adapter beside it, over 4,096 positions of
held-out text: once with the adapter file that edgellm keeps, once with the one that llama.cpp's
converter would write, which knows nothing of rsLoRA.
"""

from __future__ import annotations

import shutil
import sys

from benchmarks.measure import fresh, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, ROOT, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

ADAPTERS = ("pirate-lora", "pirate-rslora")
TARGETS = (
    ("gguf", "q8_0"),
    ("gguf", "q4_k_m"),
    ("gguf", "q2_k"),
    ("onnx", "int8"),
    ("onnx", "int4-g32"),
)
QUICK_TARGETS = (("gguf", "q8_0"),)


def measure(*, quick: bool) -> Result:
    """Survival by adapter and grid, then the rsLoRA adapter beside a base in f16."""
    model = smollm2()
    text = tokens(model)
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {}
    cosines = {}
    for name in ADAPTERS:
        shutil.copytree(ROOT / "examples" / "adapters" / name, WORK / name, dirs_exist_ok=True)
        for container, grid in QUICK_TARGETS if quick else TARGETS:
            convert = [*edgellm(), "convert", model.name, "--adapter", name, "--format", container]
            convert += [
                "--quant",
                f"rtn:{grid}",
                "--out",
                "merged",
                "--min-survival",
                "0",
                "--force",
            ]
            label = f"{name}, {container} {grid}"
            survival = output_of([*convert, "--json"])["manifest"]["measured"]["survival"]
            comparisons.append(Comparison(f"survival, {label}", "", [survival["survival"]]))
            commands[label] = shown(convert)
            cosines[label] = sorted(weight["cosine"] for weight in survival["weights"])
    ours, theirs = _beside(model.name, text.path.name, commands)
    comparisons.append(
        Comparison("KL to PEFT, pirate-rslora beside the base in f16", "nats", [ours], [theirs])
    )
    return Result(
        benchmark="adapters",
        peer="llama.cpp's converter",
        setting=f"{SMOLLM2}; two adapters of rank 4 from examples/adapters.",
        comparisons=comparisons,
        commands=commands,
        facts={
            "cosines": cosines,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "onnxruntime"],
        },
    )


def _beside(model: str, text: str, commands: dict[str, str]) -> tuple[float, float]:
    """KL of the same base with our adapter file and with that of llama.cpp's converter."""
    name = "pirate-rslora"
    convert = [*edgellm(), "convert", model, "--adapter", name, "--keep-adapters"]
    convert += ["--format", "gguf", "--quant", "f16", "--out", "apart", "--no-check", "--force"]
    run(convert)
    kept = next(path for path in (WORK / "apart").glob("*.gguf") if path.name != "model.gguf")
    fresh("llamacpp-adapter.gguf")
    write = [sys.executable, str(LOOPS / "llamacpp_adapter.py"), name, "llamacpp-adapter.gguf"]
    run(write)
    reference = [sys.executable, str(LOOPS / "adapter_reference.py"), model, name, text]
    reference += ["adapter-reference.npy"]
    if not (WORK / "adapter-reference.npy").exists():
        run(reference)
    commands |= {"edgellm, made by": shown(convert), "peer, made by": shown(write)}
    commands["reference"] = shown(reference)
    found = []
    for adapter in (f"apart/{kept.name}", "llamacpp-adapter.gguf"):
        judge = [sys.executable, str(LOOPS / "adapter_divergence.py"), "apart/model.gguf"]
        judge += [adapter, text, "adapter-reference.npy"]
        found.append(float(output_of(judge)["kl"]))
        commands[f"KL, {adapter}"] = shown(judge)
    return found[0], found[1]
