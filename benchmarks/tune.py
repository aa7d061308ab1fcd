"""What training scales and norms adds: `--tune` in stock llama.cpp against our untuned files.

Both are of one type, solver, calibration text and size. The text is of the held-out text's kind, as
one would choose it who spends half an hour on a model: on other kinds tuning gains a fraction. KL
divergence is from the unquantized model (float32) over held-out text that neither calibration nor
tuning sees. The wall is that of the whole tuned conversion.

`python -m benchmarks.tune q4_0 iq4_xs` tries these types only and changes no result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import results, tables
from benchmarks.llamacpp_files import divergences
from benchmarks.measure import fresh, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import WORK, edgellm, shown
from benchmarks.quality import CALIBRATION_TOKENS, QUICK_TYPES, WINDOWS
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

TYPES = ("q4_0", "q4_k_m", "q3_k_m", "iq4_xs")
STEPS = 200
AT_MOST = 0.8
AT_MOST_SECONDS = 1800.0


def measure(*, quick: bool, types: Sequence[str] = ()) -> Result:
    """KL with and without tuning for each type, and the walls; quick: one type, few steps."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = str(4096 if quick else CALIBRATION_TOKENS)
    names = types or (QUICK_TYPES if quick else TYPES)
    steps = 8 if quick else STEPS
    commands: dict[str, str] = {}
    walls: dict[str, float] = {}
    files: dict[str, tuple[str, str]] = {}
    for name in names:
        untuned, tuned = f"untuned-{name}", f"tuned-{name}"
        fresh(untuned, tuned)
        convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", f"gptq:{name}"]
        convert += ["--calibration", text.rest.name, "--calibration-tokens", seen]
        convert += ["--no-check", "--out"]
        run([*convert, untuned])
        tune = [*convert, tuned, "--tune", str(steps)]
        walls[name] = run(tune).wall_s
        files[name] = (f"{tuned}/model.gguf", f"{untuned}/model.gguf")
        commands |= {
            f"tuned, {name}": shown(tune),
            f"untuned, {name}": shown([*convert, untuned]),
        }
    judged = [file for pair in files.values() for file in pair]
    figures, commands["KL"] = divergences(model, text, judged)
    comparisons = [
        Comparison(
            f"{name}, KL",
            "nats",
            [figures[tuned]["kld_mean"]],
            [figures[untuned]["kld_mean"]],
            at_most=AT_MOST,
        )
        for name, (tuned, untuned) in files.items()
    ]
    slowest = max(walls, key=lambda name: walls[name])
    comparisons.append(
        Comparison(
            f"wall of the slowest, {slowest}", "s", [walls[slowest]], at_most=AT_MOST_SECONDS
        )
    )
    return Result(
        benchmark="tune",
        peer="edgellm without --tune",
        setting=(
            f"{SMOLLM2}; mean KL to it in nats over {figures[judged[-1]]['tokens']:,} tokens of "
            f"held-out text in llama.cpp, {int(seen):,} tokens of calibration of its kind, {steps} "
            "steps."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "figures": figures,
            "walls_s": walls,
            "sizes": {file: (WORK / file).stat().st_size for file in judged},
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "numpy", "torch"],
        },
    )


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False, types=sys.argv[1:]), kept)
    print(tables.render(results.load(kept)))
