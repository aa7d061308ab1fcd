"""GPTQ of SmolLM2 to int4 by edgellm and by gptqmodel: wall, peak memory, KL divergence.

Both see the same 128 x 512 tokens, write a GPTQ folder of the same layout, and start from the same
float weights. KL divergence is of the folders' weights, dequantized and computed in float32.
"""

from __future__ import annotations

import sys

from benchmarks.measure import folder_bytes, fresh, interleaved, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, peer_python, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

CALIBRATION_TOKENS = 128 * 512
GROUP = 64
PAIRS = 1
"""One pair takes a quarter of an hour."""


def measure(*, quick: bool) -> Result:
    """Wall and peak memory in turn, then both KL divergences; quick: 16 windows."""
    model = smollm2()
    text = tokens(model, 8 if quick else 32)
    seen = str(16 * 512 if quick else CALIBRATION_TOKENS)
    collect = [sys.executable, str(LOOPS / "calibration_tokens.py")]
    run([*collect, model.name, "calibration.json", seen])
    ours = [*edgellm(), "convert", model.name, "--format", "hf", "--layout", "gptq"]
    ours += ["--quant", f"gptq:int4-g{GROUP}-sym", "--calibration-tokens", seen]
    ours += ["--out", "ours-gptq", "--no-check"]
    theirs = [peer_python("gptqmodel"), str(LOOPS / "gptqmodel_quantize.py"), model.name]
    theirs += ["calibration.json", "peer-gptq", str(GROUP), "sym", "desc_act"]

    def afresh(command: list[str], out: str) -> object:
        fresh(out)
        return run(command, GPTQMODEL_CPU_WORKERS="2")

    of_ours, of_theirs = interleaved(
        lambda: afresh(ours, "ours-gptq"),
        lambda: afresh(theirs, "peer-gptq"),
        pairs=PAIRS,
        warm_up=0,
    )
    judge = [sys.executable, str(LOOPS / "float_divergences.py"), model.name, text.path.name]
    judge += ["ours-gptq", "peer-gptq"]
    figures = output_of(judge)
    return Result(
        benchmark="quantize",
        peer="gptqmodel, desc_act",
        setting=(
            f"{SMOLLM2}; int4, groups of {GROUP}, symmetric, {int(seen):,} tokens of calibration. "
            "KL of the dequantized weights in float32."
        ),
        comparisons=[
            Comparison(
                "wall",
                "s",
                [done.wall_s for done in of_ours],
                [done.wall_s for done in of_theirs],
                at_most=0.5,
            ),
            Comparison(
                "peak memory",
                "bytes",
                [done.peak_memory_bytes for done in of_ours],
                [done.peak_memory_bytes for done in of_theirs],
                at_most=0.5,
            ),
            Comparison(
                "KL to the unquantized model",
                "nats",
                [figures["ours-gptq"]["kl"]],
                [figures["peer-gptq"]["kl"]],
                at_most=1.0,
            ),
        ],
        commands={"ours": shown(ours), "peer": shown(theirs), "KL": shown(judge)},
        facts={
            "figures": figures,
            "output_bytes": {name: folder_bytes(WORK / name) for name in figures},
            "packages": ["numpy", "onnxruntime"],
        },
    )
