"""Prefill and decode through our other runtimes against each backend's own generator.

llama.cpp has ``llamacpp_loop``, onnxruntime ``decode_onnx``. Here both sides load the same folder
and compute in the same type; the peers choose their next token greedily by their own means.
"""

from __future__ import annotations

import sys

from benchmarks import genai_builds, speed
from benchmarks.measure import run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

THREADS = 2
AT_LEAST = 0.98


def measure(*, quick: bool) -> Result:
    """Tokens per second of both, by runtime."""
    model = smollm2()
    text = tokens(model)
    count = str(speed.new_tokens(quick=quick))
    convert = [*edgellm(), "convert", model.name, "--format", "mlx", "--quant", "rtn:int4-g64-min"]
    convert += ["--out", "ours-mlx", "--no-check", "--force"]
    run(convert)
    build = genai_builds.build(model, "peer-equal", genai_builds.LAST_LOGITS)
    common = [text.path.name, str(THREADS), count]
    cases = {
        "onnxruntime-genai": ("peer-equal", ["genai_loop.py", "peer-equal", *common]),
        "mlx": ("ours-mlx", ["mlx_bare.py", "ours-mlx", text.path.name, count]),
        "torch": (model.name, ["transformers_bare.py", model.name, *common]),
    }
    comparisons: list[Comparison] = []
    agreement = {}
    commands = {"mlx folder, made by": shown(convert), "genai folder, made by": shown(build)}
    for runtime, (folder, words) in cases.items():
        ours = [sys.executable, str(LOOPS / "edgellm_loop.py"), runtime, folder, *common]
        peer = [sys.executable, str(LOOPS / words[0]), *words[1:]]
        found, agreement[runtime] = speed.compare(
            ours, peer, label=runtime, at_least=dict.fromkeys(speed.QUANTITIES, AT_LEAST),
            quick=quick,
        )  # fmt: skip
        comparisons += found
        commands |= {f"edgellm, {runtime}": shown(ours), f"peer, {runtime}": shown(peer)}
    return Result(
        benchmark="runtime_loops",
        peer="the backend's own generator",
        setting=(
            f"{SMOLLM2}; symmetric int4 built by onnxruntime-genai, int4-g64-min by mlx in "
            f"float32, float32 by torch; {PROMPT_TOKENS} tokens of prompt, {count} new ones, "
            f"{THREADS} threads (mlx takes its own)."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "equal_greedy_tokens": agreement,
            "text_sha256": text.sha256,
            "packages": ["onnxruntime-genai", "mlx", "mlx-lm", "torch", "transformers"],
        },
    )
