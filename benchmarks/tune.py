"""What `--tune` adds: its files in stock llama.cpp against our untuned ones.

Both are of one type, text and size, by the solver that edgellm chooses, `awq+gptq`. It reads 16,384
tokens of the text where nothing is tuned, and what tuning reads where it is. The text is of the
held-out text's kind, as one would choose it who spends half an hour on a model: on other kinds
tuning gains a fraction. KL divergence is from the unquantized model (float32) over held-out text
that neither calibration nor tuning sees. The wall is that of the whole tuned conversion.

`python -m benchmarks.tune q4_0 iq4_xs` measures these types and keeps what stands in the results of
the others, where it was measured on this machine, with these versions and on the same text.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import results, tables
from benchmarks.llamacpp_files import divergences
from benchmarks.measure import fresh, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import RESULTS, WORK, edgellm, shown
from benchmarks.quality import CALIBRATION_TOKENS, QUICK_TYPES, WINDOWS
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens
from edgellm.manifest import read_manifest

TYPES = ("q4_0", "q4_k_m", "q3_k_m", "iq4_xs")
STEPS = 120
TEXTS = ("text_sha256", "training_text_sha256")
AT_MOST = 0.8
AT_MOST_SECONDS = 1800.0


def measure(*, quick: bool, types: Sequence[str] = ()) -> Result:
    """KL with and without tuning and the wall for each type; quick: one type, few steps."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = str(4096 if quick else CALIBRATION_TOKENS)
    steps = 8 if quick else STEPS
    judged_tokens = 0
    comparisons: list[Comparison] = []
    commands: dict[str, str] = {}
    facts: dict[str, Any] = {"figures": {}, "sizes": {}, "tuning": {}}
    for name in types or (QUICK_TYPES if quick else TYPES):
        tuned, untuned = f"tuned-{name}", f"untuned-{name}"
        fresh(tuned, untuned)
        convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", name]
        convert += ["--calibration", text.rest.name, "--no-check"]
        made = {
            untuned: [*convert, "--calibration-tokens", seen, "--out", untuned],
            tuned: [*convert, "--tune", str(steps), "--out", tuned],
        }
        walls = {folder: run(command).wall_s for folder, command in made.items()}
        files = [f"{folder}/model.gguf" for folder in (tuned, untuned)]
        figures, judged = divergences(model, text, files)
        judged_tokens = figures[files[0]]["tokens"]
        ours, others = (figures[file]["kld_mean"] for file in files)
        comparisons += [
            Comparison(f"{name}, KL", "nats", [ours], [others], at_most=AT_MOST),
            Comparison(f"{name}, wall", "s", [walls[tuned]], at_most=AT_MOST_SECONDS),
        ]
        commands |= {
            f"tuned, {name}": shown(made[tuned]),
            f"untuned, {name}": shown(made[untuned]),
            f"KL, {name}": judged,
        }
        manifest = read_manifest(WORK / tuned)
        assert manifest.artifact.tuning is not None
        trained = {"training_tokens": manifest.artifact.tuning.training_tokens}
        facts["tuning"][name] = trained | manifest.measured["tuning"]
        facts["training_text_sha256"] = manifest.artifact.tuning.text_sha256
        facts["figures"] |= figures
        facts["sizes"] |= {file: (WORK / file).stat().st_size for file in files}
    return Result(
        benchmark="tune",
        peer="edgellm without --tune",
        setting=(
            f"{SMOLLM2}; mean KL to it in nats over {judged_tokens:,} tokens of held-out text in "
            f"llama.cpp, text of its kind: {int(seen):,} tokens of it to calibrate on, or {steps} "
            "steps of tuning and all that they read."
        ),
        comparisons=comparisons,
        commands=commands,
        facts=facts
        | {"text_sha256": text.sha256, "packages": ["llama-cpp-python", "numpy", "torch"]},
    )


def merged(found: Result, kept: Result) -> Result:
    """``found``, and of ``kept`` the types that were not measured now.

    Raises ``ValueError`` where both cannot stand in one table.
    """
    machine = {**results.machine(), "load_average_1_minute": None}
    same = {
        "setting": found.setting == kept.setting,
        "text": all(found.facts[name] == kept.facts[name] for name in TEXTS),
        "machine": machine == {**kept.machine, "load_average_1_minute": None},
        "versions": results.installed_versions() == kept.versions["ours"],
    }
    if not all(same.values()):
        others = ", ".join(name for name, agrees in same.items() if not agrees)
        raise ValueError(f"the results that are kept differ in {others}: measure all types")
    rows = {row.what: row for row in (*kept.comparisons, *found.comparisons)}
    facts = {name: kept.facts[name] | found.facts[name] for name in ("figures", "sizes", "tuning")}
    return dataclasses.replace(
        found,
        comparisons=sorted(rows.values(), key=lambda row: TYPES.index(row.what.split(",")[0])),
        commands=kept.commands | found.commands,
        facts=found.facts | facts,
    )


def main(types: Sequence[str]) -> None:
    """Measure ``types`` and write them into the results, and alone into the work folder."""
    found, kept = measure(quick=False, types=types), RESULTS / "tune.json"
    results.save(found, WORK / "tune.json")
    results.save(merged(found, results.load(kept)) if kept.exists() else found, kept)
    print(tables.render(results.load(kept)))
    tables.update()


if __name__ == "__main__":
    main(sys.argv[1:])
