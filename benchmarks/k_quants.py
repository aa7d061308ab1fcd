"""Each k-quant alone, in stock llama.cpp: the matrices whose rows divide by 256, others in bf16.

SmolLM2's rows of 576 cannot be k-quants, so that a file of the mixture Q4_K_M says little about
Q4_K. The rows of ``ffn_down`` have 1,536 values: here those thirty matrices are quantized and
nothing else. Both sides calibrate on the same tokens, and one build of llama.cpp runs every file.

`python -m benchmarks.k_quants q4_k` tries these types only and changes no result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import results, tables
from benchmarks.llamacpp_files import FLOAT, LlamaCppFiles, divergences
from benchmarks.measure import fresh, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import WORK, edgellm, shown
from benchmarks.quality import CALIBRATION_TOKENS, types_of
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

ROLE = "ffn_down"
TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
QUICK_TYPES = ("q4_k",)
WINDOWS = 16
AT_MOST = 0.95


def measure(*, quick: bool, types: Sequence[str] = ()) -> Result:
    """KL of both for each type; quick: one type, few tokens."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = 4096 if quick else CALIBRATION_TOKENS
    names = types or (QUICK_TYPES if quick else TYPES)
    peer = LlamaCppFiles(model, seen)
    commands = peer.commands
    files: dict[str, tuple[str, str]] = {}
    for name in names:
        ours, theirs = f"ours-{ROLE}-{name}", f"peer-{ROLE}-{name}.gguf"
        fresh(ours)
        solve = [*edgellm(), "convert", model.name, "--format", "gguf", "--no-check"]
        solve += ["--quant", "gptq:bf16", "--tensor-grid", f"blk.*.{ROLE}.weight={name}"]
        solve += ["--calibration-tokens", str(seen), "--out", ours]
        run(solve)
        commands[f"edgellm, {name}"] = shown(solve)
        peer.make(name, theirs, ROLE)
        files[name] = (f"{ours}/model.gguf", theirs)
    for side in (0, 1):
        _check_types({name: pair[side] for name, pair in files.items()})
    judged = [file for pair in files.values() for file in pair]
    figures, commands["KL"] = divergences(model, text, judged)
    counted = figures[judged[-1]]["tokens"]
    fresh(FLOAT, *(theirs for _, theirs in files.values()))
    fresh(*(f"ours-{ROLE}-{name}" for name in names))
    return Result(
        benchmark="k_quants",
        peer="llama_model_quantize with an imatrix",
        setting=(
            f"{SMOLLM2}, its 30 matrices {ROLE} quantized and all others in bf16; mean KL to it in "
            f"nats over {counted:,} tokens of held-out text in llama.cpp, {seen:,} tokens of "
            "calibration."
        ),
        comparisons=[
            Comparison(
                name,
                "nats",
                [figures[ours]["kld_mean"]],
                [figures[theirs]["kld_mean"]],
                at_most=AT_MOST,
            )
            for name, (ours, theirs) in files.items()
        ],
        commands=commands,
        facts={
            "figures": figures,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "libgguf", "numpy"],
        },
    )


def _check_types(files: dict[str, str]) -> None:
    """Raise ``ValueError`` where a file does not have the wanted matrices in its type, alone."""
    for name, types in types_of(files).items():
        if types.keys() != {name, "bf16"} or types[name]["tensors"].keys() != {ROLE}:
            raise ValueError(f"{files[name]} is not {ROLE} in {name} and bf16: {types}")


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False, types=sys.argv[1:]), kept)
    print(tables.render(results.load(kept)))
