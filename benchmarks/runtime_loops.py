"""Prefill and decode through our other runtimes against each backend's own generator.

llama.cpp has ``llamacpp_loop``, onnxruntime ``decode_onnx``. Here both sides load the same folder
and compute in the same type; the peers choose their next token greedily by their own means.

`python -m benchmarks.runtime_loops torch` tries these runtimes only and changes no result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import genai_builds, results, speed, tables
from benchmarks.measure import run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

THREADS = 2
AT_LEAST = 0.98


FEWER_TOKENS = {"mlx": 32}
"""New tokens of runtimes that are slow on a CPU, where they are only tried."""


def measure(*, quick: bool, runtimes: Sequence[str] = ()) -> Result:
    """Tokens per second of both, of all runtimes or of these."""
    model = smollm2()
    text = tokens(model)
    convert = [*edgellm(), "convert", model.name, "--format", "mlx", "--quant", "rtn:int4-g64-min"]
    convert += ["--out", "ours-mlx", "--no-check", "--force"]
    run(convert)
    build = genai_builds.build(model, "peer-equal", genai_builds.LAST_LOGITS)
    peers = {
        "onnxruntime-genai": ("genai_loop.py", "peer-equal"),
        "mlx": ("mlx_bare.py", "ours-mlx"),
        "torch": ("transformers_bare.py", model.name),
    }
    most = speed.new_tokens(quick=quick)
    counts = {name: min(most, FEWER_TOKENS.get(name, most)) for name in peers}
    comparisons: list[Comparison] = []
    agreement = {}
    commands = {"mlx folder, made by": shown(convert), "genai folder, made by": shown(build)}
    for runtime in runtimes or peers:
        program, folder = peers[runtime]
        words = [folder, text.path.name, str(THREADS), str(counts[runtime])]
        ours = [sys.executable, str(LOOPS / "edgellm_loop.py"), runtime, *words]
        peer = [sys.executable, str(LOOPS / program), *words]
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
            f"float32, float32 by torch; {PROMPT_TOKENS} tokens of prompt, "
            f"{counts['torch']} new ones ({counts['mlx']} by mlx), {THREADS} threads (mlx has its "
            "own)."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "equal_greedy_tokens": agreement,
            "text_sha256": text.sha256,
            "packages": ["onnxruntime-genai", "mlx", "mlx-lm", "torch", "transformers"],
        },
    )


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False, runtimes=sys.argv[1:]), kept)
    print(tables.render(results.load(kept)))
