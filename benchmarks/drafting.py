"""Prompt lookup: decoding with tokens guessed from the text so far, against plain decoding.

The task is one that it is for: a passage is to be written once more, as editing does for the most
part. Answers are greedy and equal on both sides, up to near ties.
"""

from __future__ import annotations

import sys

from benchmarks import speed
from benchmarks.measure import Loop, interleaved, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

FORMATS = {"gguf": "rtn:q4_0", "onnx": "rtn:int4-g32"}
"""Of the measured model q4_k_m would be mostly q5_0, whose kernels in llama.cpp take nearly as long
for eleven tokens as eleven times for one, so that guessing gains less."""
THREADS = 2
AT_LEAST = 1.6


def measure(*, quick: bool) -> Result:
    """Decode tokens per second of both, by container."""
    model = smollm2()
    text = tokens(model)
    count = speed.new_tokens(quick=quick)
    comparisons, commands, facts = [], {}, {}
    for container, quant in FORMATS.items():
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", f"ours-{container}", "--no-check", "--force"]
        run(convert)
        loop = [sys.executable, str(LOOPS / "chat_rounds.py"), f"ours-{container}"]
        loop += [text.path.name, str(THREADS), str(count)]
        with Loop([*loop, "lookup"]) as ours, Loop([*loop, "plain"]) as plain:
            a, b = interleaved(ours.round, plain.round, pairs=1 if quick else 8, warm_up=1)
        rates = [[answer["decode_tokens_per_s"] for answer in answers] for answers in (a, b)]
        comparisons.append(
            Comparison(f"decode, {container}", "tokens/s", *rates, at_least=AT_LEAST)
        )
        pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in
                 zip(one["tokens"], other["tokens"], strict=False)]  # fmt: skip
        drafted, accepted = (
            sum(answer[key] for answer in a) for key in ("drafted_tokens", "accepted_tokens")
        )
        facts[container] = {
            "equal_tokens": sum(x == y for x, y in pairs) / len(pairs),
            "accepted": accepted / drafted if drafted else 0.0,
        }
        commands |= {
            f"{container}, made by": shown(convert),
            f"{container}, with lookup": shown([*loop, "lookup"]),
            f"{container}, plain": shown([*loop, "plain"]),
        }
    return Result(
        benchmark="drafting",
        peer="the same without --draft lookup",
        setting=(
            f"{SMOLLM2}; a passage of 256 tokens written once more, {count} new tokens, greedy, "
            f"{THREADS} threads."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            **facts,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "onnxruntime"],
        },
    )
