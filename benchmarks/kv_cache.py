"""What keys and values in fewer bits cost: KL divergence to answers with the runtime's usual cache.

The weights are the same on both sides. onnxruntime's cache is made with the graph, so that there
are two artifacts.
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


def measure(*, quick: bool) -> Result:
    """KL by runtime and type."""
    model = smollm2()
    text = tokens(model)
    commands = {}
    for out, container, quant, more in (
        ("ours-gguf", "gguf", "rtn:q8_0", []),
        ("ours-onnx", "onnx", "rtn:int8", []),
        ("ours-onnx-int8", "onnx", "rtn:int8", ["--kv-cache", "int8"]),
    ):
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", out, "--no-check", "--force", *more]
        run(convert)
        commands[f"{out}, made by"] = shown(convert)
    cases = {
        "llamacpp": ["ours-gguf=f16", "ours-gguf=q8_0", "ours-gguf=q4_0"],
        "onnxruntime": ["ours-onnx=f32", "ours-onnx-int8=int8"],
    }
    comparisons, figures = [], {}
    for runtime, named in cases.items():
        judge = [sys.executable, str(LOOPS / "kv_divergence.py"), runtime, text.path.name]
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
        setting=f"{SMOLLM2} in q8_0 and int8; mean KL over 4,096 tokens of text in windows of 512.",
        comparisons=comparisons,
        commands=commands,
        facts={
            "figures": figures,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "onnxruntime"],
        },
    )
