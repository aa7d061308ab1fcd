"""Answers at the size of Q4_K_M: grids chosen tensor by tensor against llama.cpp's fixed mixture.

`--fit` is given the bytes of the file that `llama_model_quantize` makes as Q4_K_M with an
importance matrix of the same text; a third file is our solver on the fixed mixture, to tell what
the choice of grids adds. KL divergence is from the unquantized model (float32) over held-out text,
every file run by the same build of llama.cpp.

`python -m benchmarks.fit` tries it and changes no result.
"""

from __future__ import annotations

from benchmarks import results, tables
from benchmarks.llamacpp_files import FLOAT, LlamaCppFiles, divergences
from benchmarks.measure import fresh, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import WORK, edgellm, shown
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
    seen = 4096 if quick else CALIBRATION_TOKENS
    theirs = f"peer-{TYPE}.gguf"
    fresh("fitted", "mixture")
    peer = LlamaCppFiles(model, seen)
    peer.make(TYPE, theirs)
    convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--no-check"]
    convert += ["--calibration-tokens", str(seen)]
    size = (WORK / theirs).stat().st_size
    fit = [*convert, "--quant", "gptq", "--fit", str(size), "--out", "fitted"]
    mixture = [*convert, "--quant", f"gptq:{TYPE}", "--out", "mixture"]
    run(fit)
    run(mixture)
    files = {"fitted": "fitted/model.gguf", "mixture": "mixture/model.gguf", "peer": theirs}
    figures, judge = divergences(model, text, files.values())
    sizes = {name: (WORK / file).stat().st_size for name, file in files.items()}
    fresh(FLOAT, theirs)
    return Result(
        benchmark="fit",
        peer="llama_model_quantize with an imatrix",
        setting=(
            f"{SMOLLM2}; mean KL to it in nats over {figures[theirs]['tokens']:,} tokens of "
            f"held-out text in llama.cpp, {seen:,} tokens of calibration, files of "
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
            **peer.commands,
            "KL": judge,
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
