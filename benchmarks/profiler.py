"""What `edgellm profile` says against bare loops and other benchmarks' definitions.

Overhead: decoding as a cell measures it, but for text, against a bare loop over llama.cpp's
functions. Agreement: the same quantity by llama-bench's definition (its tests pp512 and tg128) and
by onnxruntime-genai's, a bare loop over its generator. All of them run on the very model that the
cell has loaded: where memory falls, and in pages of which size, is no matter of definition, and
moves the speed of a process by more than what is asked here. llama-bench computes random tokens;
its figures of the cell's text stand beside them. Repeatability: the ratio of two cells in several
profiles, while another program has a core now and then. Those cells have one thread: two that wait
for each other are slowed by chance, not alike.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import genai_builds, speed
from benchmarks.measure import output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import PROMPT_TOKENS

THREADS = 2
AT_LEAST_OF_BARE = 0.99
AGREEMENT = (0.97, 1.03)
NO_BOUNDS = (None, None)
PROFILES = 5
REPEATED_AT_MOST = 1.05
STARTS = 8
"""Of each pair's process: what is common to both sides still differs from start to start."""


def measure(*, quick: bool) -> Result:
    """Ratios of speeds, and how far those of several profiles lie apart."""
    model = smollm2()
    count = speed.new_tokens(quick=quick)
    commands = {}
    for name, container, quant in (("q4", "gguf", "rtn:q4_0"), ("q8", "gguf", "rtn:q8_0")):
        convert = [*edgellm(), "convert", model.name, "--format", container, "--quant", quant]
        convert += ["--out", f"profiled-{name}", "--no-check", "--force"]
        run(convert)
        commands[f"{name}, made by"] = shown(convert)
    built = genai_builds.build(model, "peer-equal", genai_builds.LAST_LOGITS)
    pairs: dict[str, tuple[str, str, int, speed.Bounds]] = {
        "bare llama.cpp loop": (
            "llamacpp-bare",
            "profiled-q4",
            PROMPT_TOKENS,
            {"prefill": NO_BOUNDS, "decode": (AT_LEAST_OF_BARE, None)},
        ),
        "llama-bench's pp512 of a text": (
            "llama-bench-of-text",
            "profiled-q4",
            PROMPT_TOKENS,
            {"prefill": AGREEMENT},
        ),
        "llama-bench's pp512 of random tokens": (
            "llama-bench",
            "profiled-q4",
            PROMPT_TOKENS,
            {"prefill": AGREEMENT},
        ),
        # On an empty cache: so does a cell whose prompt has one token.
        "llama-bench's tg128": ("llama-bench", "profiled-q4", 1, {"decode": AGREEMENT}),
        "onnxruntime-genai": (
            "genai",
            "peer-equal",
            PROMPT_TOKENS,
            dict.fromkeys(speed.QUANTITIES, AGREEMENT),
        ),
    }
    comparisons: list[Comparison] = []
    for label, (peer, artifact, prompt_tokens, bounds) in pairs.items():
        both = [sys.executable, str(LOOPS / "profile_beside_peer.py"), peer, artifact]
        both += [str(THREADS), str(count), str(prompt_tokens)]
        comparisons += speed.compare_in_one_process(
            both, label=label, bounds=bounds, starts=STARTS, quick=quick
        )
        commands[f"both, {label}"] = shown(both)
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
            f"tokens of prompt, {count} new ones, {THREADS} threads. Both sides of a pair have one "
            "process and one model. llama-bench decodes on an empty cache: so does a cell whose "
            "prompt has one token."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={
            "ratios_of_profiles": ratios,
            "packages": ["llama-cpp-python", "onnxruntime-genai"],
        },
    )


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
