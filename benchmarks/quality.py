"""Answers per byte in stock llama.cpp: our calibrated GGUF files against `llama_model_quantize`'s.

Both calibrate on the same tokens: the peer's importance matrix is made of the text that our solver
sees. Files of one type have the same tensors in the same types, so they are of one size. KL
divergence is from the unquantized model (float32) over 16,384 tokens of text that calibration does
not see, every file run by the same build of llama.cpp.

`python -m benchmarks.quality q4_0 q6_k` tries these types only and changes no result;
`python -m benchmarks.quality --add-types` reads the types of the tensors of a result that has none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, tables
from benchmarks.llamacpp_files import FLOAT, LlamaCppFiles, divergences
from benchmarks.measure import fresh, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, RESULTS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

TARGETS = {
    "q2_k": 0.95,
    "q3_k_m": 0.75,
    "q4_0": 0.6,
    "q4_1": 0.95,
    "q4_k_m": 0.75,
    "iq4_nl": 0.95,
    "iq4_xs": 0.75,
    "q5_0": 0.95,
    "q5_1": 0.95,
    "q5_k_m": 0.95,
    "q6_k": 0.95,
    "q8_0": 0.95,
}
"""At most this part of the peer's KL, by type of file."""

CALIBRATION_TOKENS = 16384
WINDOWS = 32
QUICK_TYPES = ("q4_0",)


def measure(*, quick: bool, types: Sequence[str] = ()) -> Result:
    """KL of both for each type; quick: one type, few tokens."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = 4096 if quick else CALIBRATION_TOKENS
    names = types or (QUICK_TYPES if quick else tuple(TARGETS))
    peer = LlamaCppFiles(model, seen)
    commands = peer.commands
    files: dict[str, tuple[str, str]] = {}
    for name in names:
        ours, theirs = f"ours-{name}", f"peer-{name}.gguf"
        fresh(ours)
        convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--no-check"]
        convert += ["--quant", f"awq+gptq:{name}", "--calibration-tokens", str(seen), "--out", ours]
        run(convert)
        commands[f"edgellm, {name}"] = shown(convert)
        peer.make(name, theirs)
        files[name] = (f"{ours}/model.gguf", theirs)
    judged = [file for pair in files.values() for file in pair]
    figures, commands["KL"] = divergences(model, text, judged)
    sizes = {file: (WORK / file).stat().st_size for file in judged}
    of_tensors = types_of({name: ours for name, (ours, _) in files.items()})
    fresh(FLOAT, *(f"peer-{name}.gguf" for name in names))
    return Result(
        benchmark="quality",
        peer="llama_model_quantize with an imatrix",
        setting=(
            f"{SMOLLM2}; mean KL to it in nats over {figures[files[names[0]][0]]['tokens']:,} "
            f"tokens of held-out text in llama.cpp, {seen:,} tokens of calibration. Standard "
            f"errors are at most {_largest_error(figures):.1%} of the figure."
        ),
        comparisons=[
            Comparison(
                name,
                "nats",
                [figures[ours]["kld_mean"]],
                [figures[theirs]["kld_mean"]],
                at_most=TARGETS.get(name),
            )
            for name, (ours, theirs) in files.items()
        ],
        commands=commands,
        facts={
            "figures": figures,
            "sizes": sizes,
            "types": of_tensors,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "libgguf", "numpy"],
        },
    )


def types_of(files: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the matrices of GGUF files are, by the name of the file's type.

    The peer's are the same ones; tests hold that.
    """
    found = output_of([sys.executable, str(LOOPS / "gguf_types.py"), *files.values()])
    return {name: found[file] for name, file in files.items()}


def add_types(path: Path) -> None:
    """Write the types into a result that was kept without, from the files that it is about."""
    document = json.loads(path.read_text())
    names = [comparison["what"] for comparison in document["comparisons"]]
    document["facts"]["types"] = types_of({name: f"ours-{name}/model.gguf" for name in names})
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _largest_error(figures: dict[str, dict[str, float]]) -> float:
    return max(each["kld_mean_stderr"] / each["kld_mean"] for each in figures.values())


def main(arguments: Sequence[str]) -> None:
    """Try some types, or add to the kept result what the tensors of its files are."""
    if arguments == ["--add-types"]:
        add_types(RESULTS / "quality.json")
        tables.update()
        return
    kept = WORK / "trial.json"
    results.save(measure(quick=False, types=arguments), kept)
    print(tables.render(results.load(kept), commands=True))


if __name__ == "__main__":
    main(sys.argv[1:])
