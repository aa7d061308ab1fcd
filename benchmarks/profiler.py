"""What `edgellm profile` says against bare loops and other benchmarks' definitions.

Overhead: decoding as a cell measures it, but for text, against a bare loop over llama.cpp's
functions. Agreement: the same quantity by llama-bench's definition (its tests pp512 and tg128) and
by onnxruntime-genai's, a bare loop over its generator. Both bare loops run on the very model that
the cell has loaded: where memory falls, and in pages of which size, is no matter of definition, and
moves the speed of a process by more than what is asked here. Nor are the tokens: llama.cpp computes
a prompt of random ones, as llama-bench has them, quicker than one of text. Repeatability: the ratio
of two cells in several profiles, while another program has a core now and then. Those cells have
one thread: two that wait for each other are slowed by chance, not alike.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import genai_builds, speed
from benchmarks.llamacpp_loop import repack_of
from benchmarks.measure import output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, WORK, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS, tokens

THREADS = 2
AT_LEAST_OF_BARE = 0.99
AGREEMENT = (0.97, 1.03)
NO_BOUNDS = (None, None)
Bounds = dict[str, tuple[float | None, float | None]]
"""The least and the most of a ratio, by the quantity that is compared."""

PROFILES = 5
REPEATED_AT_MOST = 1.05
STARTS = 10
"""Of two programs: one and the same, started twice, differs from itself by some percent."""


def measure(*, quick: bool) -> Result:
    """Ratios of speeds, and how far those of several profiles lie apart."""
    model = smollm2()
    text = tokens(model)
    count = speed.new_tokens(quick=quick)
    commands = {}
    for name, container, quant in (("q4", "gguf", "rtn:q4_0"), ("q8", "gguf", "rtn:q8_0")):
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", f"profiled-{name}", "--no-check", "--force"]
        run(convert)
        commands[f"{name}, made by"] = shown(convert)
    file = next((WORK / "profiled-q4").glob("*.gguf")).relative_to(WORK)
    repack = repack_of([sys.executable, str(LOOPS / "llamacpp_bare.py"), str(file), text.path.name])
    rounds = [sys.executable, str(LOOPS / "profile_rounds.py"), "llamacpp", "profiled-q4"]
    rounds += [str(THREADS), str(count), str(PROMPT_TOKENS)]
    # A cell is a process of its own, as it is in a profile: two models in one slow each other down.
    prompts, answers = [*rounds, str(PROMPT_TOKENS)], [*rounds[:-1], "1", "1"]
    by_llamabench = [str(THREADS), str(count), str(PROMPT_TOKENS), repack]
    llamabench = [sys.executable, str(LOOPS / "llamabench_rounds.py"), str(file)]
    of_random = [*llamabench, "random", *by_llamabench]
    pairs: dict[str, tuple[list[str], list[str], Bounds]] = {
        "llama-bench's pp512 of a text": (
            prompts,
            [*llamabench, text.path.name, *by_llamabench],
            {"prefill": AGREEMENT},
        ),
        # What no definition takes away: other tokens.
        "llama-bench's pp512 of random tokens": (prompts, of_random, {"prefill": NO_BOUNDS}),
        "llama-bench's tg128": (answers, of_random, {"decode": AGREEMENT}),
    }
    built = genai_builds.build(model, "peer-equal", genai_builds.LAST_LOGITS)
    beside = [sys.executable, str(LOOPS / "profile_beside_bare.py")]
    words = [str(THREADS), str(count), str(PROMPT_TOKENS)]
    together: dict[str, tuple[list[str], Bounds]] = {
        "bare llama.cpp loop": (
            [*beside, "llamacpp", "profiled-q4", *words],
            {"prefill": NO_BOUNDS, "decode": (AT_LEAST_OF_BARE, None)},
        ),
        "onnxruntime-genai": (
            [*beside, "onnxruntime-genai", "peer-equal", *words],
            dict.fromkeys(speed.QUANTITIES, AGREEMENT),
        ),
    }
    comparisons: list[Comparison] = []
    for label, (command, bounds) in together.items():
        comparisons += speed.compare_in_one_process(
            command, label=label, **_asked(bounds), starts=STARTS, quick=quick
        )
        commands[f"both, {label}"] = shown(command)
    for label, (ours, peer, bounds) in pairs.items():
        found, _ = speed.compare(
            ours, peer, label=label, **_asked(bounds), starts=STARTS, quick=quick
        )
        comparisons += [each for each in found if each.what.startswith(tuple(bounds))]
        commands |= {f"edgellm, {label}": shown(ours), label: shown(peer)}
    profile = [*edgellm(), "profile", "profiled-q4", "profiled-q8", "--prompt-tokens", "64"]
    profile += [
        "--threads",
        "1",
        "--new-tokens",
        str(count // 2),
        "--repeat",
        "2" if quick else "10",
        "--json",
    ]
    ratios = _ratios(profile, 1 if quick else PROFILES)
    comparisons.append(
        Comparison(
            f"largest ratio of q8_0 to q4_0 by the smallest, {len(ratios)} profiles",
            "",
            [max(ratios) / min(ratios)],
            at_most=REPEATED_AT_MOST,
        )
    )
    commands |= {
        "genai folder, made by": shown(built),
        "disturbed, again and again": shown(profile),
        "by": shown([sys.executable, str(LOOPS / "disturber.py")]),
    }
    return Result(
        benchmark="profiler",
        peer="the other's own",
        setting=(
            f"{SMOLLM2}, q4_0 GGUF and symmetric int4 built by onnxruntime-genai; {PROMPT_TOKENS} "
            f"tokens of prompt, {count} new ones, {THREADS} threads. The bare loops of llama.cpp "
            "and onnxruntime-genai run in the cell's process, on its model. llama-bench decodes on "
            "an empty cache: so does a cell whose prompt has one token."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "ratios_of_profiles": ratios,
            "text_sha256": text.sha256,
            "packages": ["llama-cpp-python", "onnxruntime-genai"],
        },
    )


def _asked(bounds: Bounds) -> dict[str, dict[str, float]]:
    """The arguments of a comparison that ``bounds`` stand for."""
    return {
        "at_least": {name: least for name, (least, _) in bounds.items() if least},
        "at_most": {name: most for name, (_, most) in bounds.items() if most},
    }


def _ratios(profile: list[str], times: int) -> list[float]:
    """The second cell's decoding speed by the first's in each profile, measured while disturbed."""
    disturber = subprocess.Popen([sys.executable, str(LOOPS / "disturber.py")])
    try:
        found = []
        for _ in range(times):
            document = output_of(profile)
            found.append(
                next(
                    each["ratio"]["median"]
                    for each in document["ratios"]
                    if each["quantity"] == "decode_tokens_per_s"
                )
            )
        return found
    finally:
        disturber.kill()
        disturber.wait()
