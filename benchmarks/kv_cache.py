"""What keys and values in fewer bits cost: KL divergence to answers with the runtime's usual cache.

The weights are floats, the same on both sides: kernels for rounded weights round activations too,
which can hide what a cache costs. onnxruntime's cache is made with the graph, so that there are two
artifacts. MLX is left out: on a CPU its rounded caches take minutes for a window.
"""

from __future__ import annotations

import sys

from benchmarks.measure import output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

AT_MOST = {"q8_0": 0.002}
"""Of the types that have a target, in nats."""


WINDOWS = "8"
"""Of 512 tokens."""


def measure(*, quick: bool) -> Result:
    """KL by runtime and type."""
    model = smollm2()
    text = tokens(model)
    commands = {}
    for out, container, quant, more in (
        ("ours-gguf", "gguf", "f32", []),
        ("ours-onnx", "onnx", "f32", []),
        ("ours-onnx-int8", "onnx", "f32", ["--kv-cache", "int8"]),
    ):
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", out, "--no-check", "--force", *more]
        run(convert)
        commands[f"{out}, made by"] = shown(convert)
    cases = {
        "llamacpp": ["ours-gguf=f16", "ours-gguf=q8_0", "ours-gguf=q4_0"],
        "onnxruntime": ["ours-onnx=f32", "ours-onnx-int8=int8"],
        "torch": [f"{model.name}=f32", f"{model.name}=int8", f"{model.name}=int4"],
    }
    comparisons, figures = [], {}
    for runtime, named in cases.items():
        judge = [sys.executable, str(LOOPS / "kv_divergence.py"), runtime, text.path.name, WINDOWS]
        judge += named[:2] if quick else named
        figures[runtime] = output_of(judge)
        commands[runtime] = shown(judge)
        base = named[0].rsplit("=", 1)[1]
        comparisons += [
            Comparison(
                f"{runtime}, {kind} against {base}",
                "nats",
                [found["kld_mean"]],
                at_most=AT_MOST.get(kind),
            )
            for kind, found in figures[runtime].items()
        ]
    return Result(
        benchmark="kv_cache",
        peer="",
        setting=(f"{SMOLLM2} in f32; mean KL over 4,096 tokens of text in windows of 512."),
        comparisons=comparisons,
        commands=commands,
        facts={
            "figures": figures,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "onnxruntime", "transformers"],
        },
    )
