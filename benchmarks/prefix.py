"""Time to the first token of a prompt whose first 2,048 tokens were computed before, against cold.

Both sides are one chat that stays loaded; each round asks another question on the same long text
with an empty cache, and ours finds the text in its ``PrefixCache``.
"""

from __future__ import annotations

import sys

from benchmarks.measure import Loop, interleaved, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

FORMATS = {"gguf": "rtn:q4_k_m", "onnx": "rtn:int4-g32"}
THREADS = 2
AT_MOST = 0.05


def measure(*, quick: bool) -> Result:
    """Seconds to the first token of both, by container."""
    model = smollm2()
    text = tokens(model)
    comparisons, commands = [], {}
    for container, quant in FORMATS.items():
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", f"ours-{container}", "--no-check", "--force"]
        run(convert)
        loop = [sys.executable, str(LOOPS / "chat_rounds.py"), f"ours-{container}"]
        loop += [text.path.name, str(THREADS), "1"]
        with Loop([*loop, "prefix"]) as ours, Loop([*loop, "cold"]) as cold:
            a, b = interleaved(ours.round, cold.round, pairs=1 if quick else 5, warm_up=1)
        seconds = [[answer["time_to_first_token_s"] for answer in answers] for answers in (a, b)]
        comparisons.append(
            Comparison(f"time to first token, {container}", "s", *seconds, at_most=AT_MOST)
        )
        commands |= {
            f"{container}, made by": shown(convert),
            f"{container}, with a prefix cache": shown([*loop, "prefix"]),
            f"{container}, cold": shown([*loop, "cold"]),
        }
    return Result(
        benchmark="prefix",
        peer="the same without a prefix cache",
        setting=f"{SMOLLM2}; 2,048 tokens of text and a question, {THREADS} threads.",
        comparisons=comparisons,
        commands=commands,
        facts={"text_sha256": text.sha256, "packages": ["llama-cpp-python", "onnxruntime"]},
    )
