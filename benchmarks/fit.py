"""Answers at the size of Q4_K_M: grids chosen tensor by tensor against llama.cpp's fixed mixture.

`--fit` is given the bytes of the file that `llama_model_quantize` makes as Q4_K_M with an
importance matrix of the same text; a third file is our solver on the fixed mixture, to tell what
the choice of grids adds. KL divergence is from the unquantized model (float32) over held-out text,
every file run by the same build of llama.cpp.

`python -m benchmarks.fit` tries it and changes no result.
"""

from __future__ import annotations

import sys

from benchmarks import results, tables
from benchmarks.measure import fresh, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.quality import CALIBRATION_TOKENS, WINDOWS
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

TYPE = "q4_k_m"
AT_MOST = 0.6
"""Of the peer's KL, by the chosen grids."""


def measure(*, quick: bool) -> Result:
    """KL of the chosen grids and of the peer's mixture at one size; quick: few tokens."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = str(4096 if quick else CALIBRATION_TOKENS)
    theirs = f"peer-{TYPE}.gguf"
    fresh("float", theirs, "fitted", "mixture")
    convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--no-check"]
    run([*convert, "--quant", "bf16", "--out", "float"])
    weigh = [sys.executable, str(LOOPS / "importance.py"), model.name, "imatrix.gguf", seen]
    run(weigh)
    quantize = [sys.executable, str(LOOPS / "llamacpp_quantize.py"), "float/model.gguf"]
    quantize += [theirs, TYPE, "imatrix.gguf"]
    run(quantize)
    size = (WORK / theirs).stat().st_size
    calibrated = [*convert, "--calibration-tokens", seen]
    fit = [*calibrated, "--quant", "gptq", "--fit", str(size), "--out", "fitted"]
    mixture = [*calibrated, "--quant", f"gptq:{TYPE}", "--out", "mixture"]
    run(fit)
    run(mixture)
    files = {"fitted": "fitted/model.gguf", "mixture": "mixture/model.gguf", "peer": theirs}
    judge = [sys.executable, str(LOOPS / "divergences.py"), model.name, text.path.name]
    judge += files.values()
    figures = output_of(judge)
    sizes = {name: (WORK / file).stat().st_size for name, file in files.items()}
    fresh("float", theirs)
    return Result(
        benchmark="fit",
        peer="llama_model_quantize with an imatrix",
        setting=(
            f"{SMOLLM2}; mean KL to it in nats over {figures[theirs]['tokens']:,} tokens of "
            f"held-out text in llama.cpp, {int(seen):,} tokens of calibration, files of "
            f"{sizes['peer']:,} bytes or less."
        ),
        comparisons=[
            Comparison(
                f"{name}, at the size of {TYPE}",
                "nats",
                [figures[files[name]]["kld_mean"]],
                [figures[theirs]["kld_mean"]],
                at_most=bound,
            )
            for name, bound in (("fitted", AT_MOST), ("mixture", None))
        ],
        commands={
            "edgellm, fitted": shown(fit),
            "edgellm, mixture": shown(mixture),
            "peer, importance": shown(weigh),
            "peer": shown(quantize),
            "KL": shown(judge),
        },
        facts={
            "figures": figures,
            "sizes": sizes,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "libgguf", "numpy"],
        },
    )


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False), kept)
    print(tables.render(results.load(kept)))
