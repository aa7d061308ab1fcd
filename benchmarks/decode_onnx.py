"""Prefill and decode of equal int4 graphs: our onnxruntime loop against onnxruntime-genai.

Equal in what costs: symmetric int4 in blocks of 32 for body, head and embedding, float32 KV cache,
logits for the last position only, the same onnxruntime, greedy choice of the next token.
"""

from __future__ import annotations

import sys

from benchmarks import genai_builds, speed
from benchmarks.measure import run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

GRID = "int4-g32-sym"
THREADS = (1, 2)


def measure(*, quick: bool) -> Result:
    """Tokens per second of both, by number of threads."""
    model = smollm2()
    text = tokens(model)
    convert = [*edgellm(), "convert", model.name, "--format", "onnx", "--quant", f"rtn:{GRID}"]
    convert += ["--head", GRID, "--embed", GRID, "--out", "ours-equal", "--no-check", "--force"]
    run(convert)
    build = genai_builds.build(model, "peer-equal", genai_builds.LAST_LOGITS)
    comparisons: list[Comparison] = []
    agreement = {}
    commands = {"edgellm, made by": shown(convert), "peer, made by": shown(build)}
    for threads in THREADS:
        common = [text.path.name, str(threads), str(speed.new_tokens(quick=quick))]
        ours = [sys.executable, str(LOOPS / "edgellm_loop.py")]
        ours += ["onnxruntime", "ours-equal", *common]
        peer = [sys.executable, str(LOOPS / "genai_loop.py"), "peer-equal", *common]
        label = speed.threads_label(threads)
        found, agreement[label] = speed.compare(
            ours,
            peer,
            label=label,
            at_least=dict.fromkeys(speed.QUANTITIES, 1.03),
            quick=quick,
        )
        comparisons += found
        commands |= {f"edgellm, {label}": shown(ours), f"peer, {label}": shown(peer)}
    return Result(
        benchmark="decode_onnx",
        peer="onnxruntime-genai",
        setting=(
            f"{SMOLLM2}, symmetric int4 in blocks of 32 throughout, logits of the last position; "
            f"{PROMPT_TOKENS} tokens of prompt, {speed.new_tokens(quick=quick)} new ones."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "equal_greedy_tokens": agreement,
            "text_sha256": text.sha256,
            "packages": ["onnxruntime", "onnxruntime-genai"],
        },
    )
