"""Our best int4 recipe against onnxruntime-genai's default int4 build: decode, and quality.

Quality is the mean KL divergence from the unquantized model (transformers, float32) to the
quantized one over 4,096 positions of held-out text; ours must not be worse.

`python -m benchmarks.best_int4 --quant int4-g32 --kv-cache int8` tries another recipe and changes
no result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import genai_builds, results, speed, tables
from benchmarks.measure import folder_bytes, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, peers_python, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

RECIPE = ("--quant", "rtn:int4-g64", "--kv-cache", "int8")
"""What `edgellm convert --format onnx` is given beside source and output."""

THREADS = (1, 2)


def measure(*, quick: bool, recipe: Sequence[str] = RECIPE) -> Result:
    """Decode and prefill speed by number of threads, then both KL divergences."""
    model = smollm2()
    text = tokens(model)
    convert = [*edgellm(), "convert", model.name, "--format", "onnx", *recipe]
    convert += ["--out", "ours-best", "--no-check", "--force"]
    run(convert)
    build = genai_builds.build(model, "peer-default")
    reference = [peers_python(), str(LOOPS / "reference_logits.py")]
    reference += [model.name, text.path.name, "reference.npy"]
    if not (WORK / "reference.npy").exists():
        run(reference)
    commands = {"edgellm, made by": shown(convert), "peer, made by": shown(build)}
    commands["reference"] = shown(reference)

    qualities = {}
    for who, folder in (("edgellm", "ours-best"), ("genai", "peer-default")):
        judge = [sys.executable, str(LOOPS / "divergence.py"), who, folder]
        judge += [text.path.name, "reference.npy"]
        qualities[who] = output_of(judge)
        commands[f"KL, {who}"] = shown(judge)

    comparisons: list[Comparison] = []
    for threads in THREADS:
        common = [text.path.name, str(threads), str(speed.new_tokens(quick=quick))]
        ours = [sys.executable, str(LOOPS / "edgellm_loop.py")]
        ours += ["onnxruntime", "ours-best", *common]
        peer = [sys.executable, str(LOOPS / "genai_loop.py"), "peer-default", *common]
        label = speed.threads_label(threads)
        found, _ = speed.compare(ours, peer, label=label, at_least={"decode": 1.2}, quick=quick)
        comparisons += found
        commands |= {f"edgellm, {label}": shown(ours), f"peer, {label}": shown(peer)}
    comparisons += [
        Comparison(
            "KL to the unquantized model",
            "nats",
            [qualities["edgellm"]["kl"]],
            [qualities["genai"]["kl"]],
            at_most=1.0,
        ),
        Comparison(
            "size",
            "bytes",
            [folder_bytes(WORK / "ours-best")],
            [folder_bytes(WORK / "peer-default")],
        ),
    ]
    return Result(
        benchmark="best_int4",
        peer="onnxruntime-genai, default int4",
        setting=f"{SMOLLM2}; edgellm with `{' '.join(recipe)}`.",
        comparisons=comparisons,
        commands=commands,
        facts={
            "quality": qualities,
            "text_sha256": text.sha256,
            "packages": ["onnxruntime", "onnxruntime-genai"],
        },
    )


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False, recipe=sys.argv[1:]), kept)
    print(tables.render(results.load(kept)))
