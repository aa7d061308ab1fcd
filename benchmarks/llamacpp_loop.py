"""Prefill and decode through our llama.cpp runtime against a bare loop over the same library."""

from __future__ import annotations

import sys

from benchmarks import speed
from benchmarks.measure import CommandFailed, Loop, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

GRID = "q4_k_m"
THREADS = (1, 2)


def measure(*, quick: bool) -> Result:
    """Tokens per second of both, by number of threads."""
    model = smollm2()
    text = tokens(model)
    convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", f"rtn:{GRID}"]
    convert += ["--out", "ours-gguf", "--no-check", "--force"]
    run(convert)
    file = next((WORK / "ours-gguf").glob("*.gguf")).relative_to(WORK)
    bare = [sys.executable, str(LOOPS / "llamacpp_bare.py"), str(file), text.path.name]
    repack = repack_of(bare)
    comparisons: list[Comparison] = []
    agreement = {}
    commands = {"the file, made by": shown(convert)}
    for threads in THREADS:
        common = [text.path.name, str(threads), str(speed.new_tokens(quick=quick))]
        ours = [sys.executable, str(LOOPS / "edgellm_loop.py"), "llamacpp", "ours-gguf", *common]
        peer = [*bare, str(threads), str(speed.new_tokens(quick=quick)), repack]
        label = speed.threads_label(threads)
        found, agreement[label] = speed.compare(
            ours, peer, label=label, at_least=dict.fromkeys(speed.QUANTITIES, 0.98), quick=quick
        )
        comparisons += found
        commands |= {f"edgellm, {label}": shown(ours), f"peer, {label}": shown(peer)}
    return Result(
        benchmark="llamacpp_loop",
        peer="bare llama-cpp-python loop",
        setting=(
            f"{SMOLLM2}, the same {GRID} GGUF file on both sides; {PROMPT_TOKENS} tokens of "
            f"prompt, {speed.new_tokens(quick=quick)} new ones."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "equal_greedy_tokens": agreement,
            "weights_repacked": repack == "1",
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python"],
        },
    )


def repack_of(bare: list[str]) -> str:
    """``1``, or ``0`` where this build of llama.cpp crashes on rearranged weights."""
    try:
        with Loop([*bare, "1", "1", "1"]) as loop:
            loop.round()
    except CommandFailed:
        return "0"
    return "1"
