"""Hugging Face folder to ONNX int4: edgellm against onnxruntime-genai's model builder.

Both write their default int4 graph.
"""

from __future__ import annotations

from benchmarks import genai_builds
from benchmarks.measure import Run, folder_bytes, fresh, interleaved, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import WORK, edgellm, shown
from benchmarks.results import Comparison, Result

PAIRS = 5


def measure(*, quick: bool) -> Result:
    """Wall and peak memory of both."""
    model = smollm2()
    ours = [*edgellm(), "convert", model.name, "--format", "onnx", "--quant", "rtn:int4-g32"]
    ours += ["--out", "ours-onnx", "--no-check"]
    peer = genai_builds.command(model, "peer-onnx")

    def export() -> Run:
        fresh("ours-onnx")
        return run(ours)

    def build() -> Run:
        fresh("peer-onnx", "genai-cache")
        return run(peer)

    a, b = interleaved(export, build, pairs=1 if quick else PAIRS, warm_up=0 if quick else 1)
    return Result(
        benchmark="export_onnx",
        peer="onnxruntime-genai's builder",
        setting=f"{SMOLLM2}, to ONNX int4 in blocks of 32; no side loads the result to check it.",
        comparisons=[
            Comparison("wall", "s", [x.wall_s for x in a], [x.wall_s for x in b], at_most=0.3),
            Comparison(
                "peak memory",
                "bytes",
                [x.peak_memory_bytes for x in a],
                [x.peak_memory_bytes for x in b],
                at_most=0.5,
            ),
        ],
        commands={"edgellm": shown(ours), "peer": shown(peer)},
        facts={
            "ours_bytes": folder_bytes(WORK / "ours-onnx"),
            "peer_bytes": folder_bytes(WORK / "peer-onnx"),
            "packages": ["onnxruntime-genai", "onnx-ir", "torch", "transformers"],
        },
    )
