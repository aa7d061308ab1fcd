"""Our ONNX artifacts in onnxruntime against llama.cpp on like grids: speed, and KL of both.

int4 in blocks of 32 against Q4_0, whose blocks are the same, and int8-dynamic, which multiplies
whole numbers, against Q8_0. Both sides hold keys and values in their usual type (f32 and f16).
"""

from __future__ import annotations

import sys

from benchmarks import speed
from benchmarks.llamacpp_loop import repack_of
from benchmarks.measure import output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, peers_python, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

PAIRS = {"int4-g32-sym": "q4_0", "int8-dynamic": "q8_0"}
"""Grids by ours and the peer's file."""

AT_LEAST = {
    ("int4-g32-sym", 1): {"decode": 0.8, "prefill": 1.0},
    ("int4-g32-sym", 2): {"decode": 0.85, "prefill": 1.0},
    ("int8-dynamic", 1): {"prefill": 1.3},
    ("int8-dynamic", 2): {"prefill": 1.3},
}


def measure(*, quick: bool) -> Result:
    """Tokens per second of both, by grid and number of threads, then KL divergences."""
    model = smollm2()
    text = tokens(model)
    if not (WORK / "reference.npy").exists():
        reference = [peers_python(), str(LOOPS / "reference_logits.py")]
        run([*reference, model.name, text.path.name, "reference.npy"])
    comparisons: list[Comparison] = []
    commands, agreement, qualities = {}, {}, {}
    count = str(speed.new_tokens(quick=quick))
    for ours_grid, peer_grid in PAIRS.items():
        folders = {"onnx": f"ours-{ours_grid}", "gguf": f"peer-{peer_grid}"}
        kl = {}
        for container, folder in folders.items():
            grid = ours_grid if container == "onnx" else peer_grid
            convert = [*edgellm(), "convert", model.name, "--format", container]
            convert += ["--quant", f"rtn:{grid}", "--out", folder, "--no-check", "--force"]
            run(convert)
            judge = [sys.executable, str(LOOPS / "divergence.py"), "edgellm", folder]
            judge += [text.path.name, "reference.npy"]
            kl[container] = output_of(judge)
            commands |= {f"{folder}, made by": shown(convert), f"KL, {folder}": shown(judge)}
        qualities[ours_grid] = kl
        file = next((WORK / folders["gguf"]).glob("*.gguf")).relative_to(WORK)
        bare = [sys.executable, str(LOOPS / "llamacpp_bare.py"), str(file), text.path.name]
        repack = repack_of(bare)
        for (grid, threads), at_least in AT_LEAST.items():
            if grid != ours_grid:
                continue
            ours = [sys.executable, str(LOOPS / "edgellm_loop.py"), "onnxruntime", folders["onnx"]]
            ours += [text.path.name, str(threads), count]
            peer = [*bare, str(threads), count, repack]
            label = f"{grid} / {peer_grid}, {speed.threads_label(threads)}"
            found, agreement[label] = speed.compare(
                ours, peer, label=label, at_least=at_least, quick=quick
            )
            comparisons += found
            commands |= {f"edgellm, {label}": shown(ours), f"peer, {label}": shown(peer)}
        comparisons.append(
            Comparison(
                f"KL to the unquantized model, {ours_grid} / {peer_grid}",
                "nats",
                [kl["onnx"]["kl"]],
                [kl["gguf"]["kl"]],
            )
        )
    return Result(
        benchmark="onnx_llamacpp",
        peer="bare llama-cpp-python loop",
        setting=(
            f"{SMOLLM2}, plainly rounded; {PROMPT_TOKENS} tokens of prompt, {count} new ones. KL "
            "over 4,096 tokens of text."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "equal_greedy_tokens": agreement,
            "quality": qualities,
            "text_sha256": text.sha256,
            "packages": ["onnxruntime", "llama-cpp-python"],
        },
    )
