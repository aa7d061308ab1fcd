"""``edgellm demo``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options, render
from edgellm.cli.progress_bar import progress_shown

if TYPE_CHECKING:
    from edgellm.artifact import Artifact

ARTIFACTS = (("onnx", "int4-g32"), ("gguf", "q4_k_m"))
"""What is made of the demo's model: container and grid."""

QUESTION = "What is photosynthesis?"
MAX_TOKENS = 96
REPEAT_PENALTY = 1.1
"""A model this small runs in circles without one."""


def demo(
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What to ask the model.")
    ] = QUESTION,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the artifacts go; replaced if there.")
    ] = Path("demo"),
    as_json: options.AsJson = False,
) -> None:
    """Convert a small real model, verify it and ask it.

    SmolLM2-135M-Instruct becomes ONNX with 4-bit weights and GGUF q4_k_m; each is checked, asked,
    and measured in a process of its own. Half a minute on two cores, nothing is downloaded.

    \b
    Examples:
      edgellm demo
      edgellm demo "How do bees make honey?"
      edgellm demo --out /tmp/demo --json | jq '.artifacts[].decode_tokens_per_s'
    """
    from edgellm.demo_model import demo_model

    source = demo_model()
    artifacts = [
        _convert(source, out / container, container, quant, quiet=as_json)
        for container, quant in ARTIFACTS
    ]
    text = _ask(artifacts[0], question, quiet=as_json)
    if not as_json:
        render.say("\nMeasuring each in a process of its own ...")
    measured = [_measured(artifact, question) for artifact in artifacts]
    if as_json:
        render.show_json({"question": question, "text": text, "artifacts": measured})
        return
    _show(measured)
    render.say(f"\nTalk to it: edgellm run {artifacts[0].path}")


def _convert(source: Path, out: Path, container: str, quant: str, *, quiet: bool) -> Artifact:
    from edgellm.artifact import verify
    from edgellm.conversion import convert
    from edgellm.recipe import make_recipe

    if not quiet:
        render.say(f"\n{source.name} to {container}, {quant}")
    recipe = make_recipe({"source": str(source), "format": container, "quant": f"rtn:{quant}"})
    with progress_shown(quiet=quiet) as progress:
        artifact = convert(recipe, out, force=True, progress=progress)
    converted = time.perf_counter()
    verify(artifact)
    if not quiet and artifact.manifest:
        made = render.duration(artifact.manifest.measured["convert_s"])
        verified = render.duration(time.perf_counter() - converted)
        render.say_notes([f"made in {made}, all checksums verified in {verified}: {artifact.path}"])
    return artifact


def _ask(artifact: Artifact, question: str, *, quiet: bool) -> str:
    from edgellm.chat import open as open_model
    from edgellm.sampling import SamplingOptions

    if not quiet:
        render.say(f"\n>>> {question}")
    sampling = SamplingOptions(repeat_penalty=REPEAT_PENALTY)
    with open_model(artifact.path, verify=False) as session:
        stream = session.stream(question, max_tokens=MAX_TOKENS, sampling=sampling)
        for piece in stream:
            if not quiet:
                print(piece, end="", flush=True)
    if not quiet:
        print()
    return stream.text


def _measured(artifact: Artifact, question: str) -> dict[str, Any]:
    """Size and speed of an artifact; where nothing here runs it, ``reason`` says what would."""
    assert artifact.manifest is not None
    made = artifact.manifest.artifact
    facts: dict[str, Any] = {
        "path": str(artifact.path),
        "container": made.container,
        "quant": made.recipe["quant"],
        "output_bytes": sum(file.nbytes for file in made.files),
        "convert_s": artifact.manifest.measured["convert_s"],
    }
    options = ("--max-tokens", str(MAX_TOKENS), "--repeat-penalty", str(REPEAT_PENALTY), "--json")
    run = subprocess.run(
        [sys.executable, "-m", "edgellm", "run", str(artifact.path), question, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    answer = json.loads(run.stdout)
    if "error" in answer:
        return {**facts, "reason": answer["error"]["message"]}
    return {**facts, **answer}


def _show(measured: list[dict[str, Any]]) -> None:
    print()
    columns = ("artifact", "quant", "size", "made in", "first token", "decode", "peak memory")
    render.show_table(columns, [_row(facts) for facts in measured], right="23456")
    for facts in measured:
        if "text" not in facts:
            render.show_notes([f"{facts['path']}: {facts['reason']}"])


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    made = (facts["path"], facts["quant"], render.size(facts["output_bytes"]))
    took = render.duration(facts["convert_s"])
    if "text" not in facts:
        return (*made, took, "-", "-", "-")
    return (
        *made,
        took,
        render.duration(facts["time_to_first_token_s"]),
        f"{facts['decode_tokens_per_s'] or 0:.0f} tokens/s",
        render.size(facts["peak_memory_bytes"]),
    )
