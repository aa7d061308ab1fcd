"""Cold start: `edgellm --help`, and `edgellm run` until the first token is on stdout.

Files are in the page cache; every process is new. "Verified before" means that the artifact's
checksums passed in an earlier run and its files did not change since, the usual case.
"""

from __future__ import annotations

import sys

from benchmarks.measure import fresh, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import WORK, edgellm, shown
from benchmarks.results import Comparison, Result

REPETITIONS = 10
FORMATS = {"onnx": "int4-g32", "gguf": "q4_k_m"}
QUESTION = "Why is the sky blue?"


def measure(*, quick: bool) -> Result:
    """Seconds to help and to the first token."""
    count = 1 if quick else REPETITIONS
    help_command = [*edgellm(), "--help"]
    run(help_command)
    bare = [run([sys.executable, "-c", "pass"]).wall_s for _ in range(count)]
    helped = [run(help_command).wall_s for _ in range(count)]
    comparisons = [
        Comparison("`edgellm --help`", "s", helped, at_most=0.3),
        Comparison("of which Python itself", "s", bare),
    ]
    commands = {"help": shown(help_command)}
    model = smollm2()
    cache = {"XDG_CACHE_HOME": str(WORK / "cold-cache")}
    for container, grid in FORMATS.items():
        out = f"cold-{container}"
        convert = [
            *edgellm(),
            "convert",
            model.name,
            "--format",
            container,
            "--quant",
            f"rtn:{grid}",
        ]
        run([*convert, "--out", out, "--no-check", "--force"])
        ask = [*edgellm(), "run", out, QUESTION, "--max-tokens", "16"]
        first, again = [], []
        for _ in range(count):
            fresh("cold-cache")
            first.append(_first_token_s(ask, cache))
            again.append(_first_token_s(ask, cache))
        comparisons += [
            Comparison(f"`edgellm run` to the first token, {container}", "s", again, at_most=1.5),
            Comparison(f"the same, checksums not verified before, {container}", "s", first),
        ]
        commands[container] = shown(ask)
    return Result(
        benchmark="cold_start",
        peer="",
        setting=(
            f"{SMOLLM2}; ONNX {FORMATS['onnx']} and GGUF {FORMATS['gguf']}; each time a new "
            "process, its files in the page cache."
        ),
        comparisons=comparisons,
        commands=commands,
        facts={"packages": ["onnxruntime", "llama-cpp-python"]},
    )


def _first_token_s(command: list[str], variables: dict[str, str]) -> float:
    first_output_s = run(command, read_stdout=True, **variables).first_output_s
    assert first_output_s is not None
    return first_output_s
