"""``edgellm run`` with an encoder: embeddings, labels or masked words, as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from edgellm.cli import render
from edgellm.errors import SourceError, UsageError

if TYPE_CHECKING:
    from edgellm.runtimes.session import Device

HEEDED = frozenset(
    ("path", "prompt", "words", "device", "threads", "verify", "stats", "as_json", "runtime")
)
"""Parameters of ``run`` that mean something to an encoder."""

RUNTIME = "onnxruntime"


def is_encoder(path: Path) -> bool:
    """Whether ``path`` is an encoder's artifact; what is no artifact is left to others."""
    from edgellm.artifact import open_artifact

    try:
        return open_artifact(path).encoder is not None
    except SourceError:
        return False


def run_encoder(
    context: typer.Context,
    path: Path,
    texts: Sequence[str],
    *,
    device: str,
    threads: int | None,
    verify: bool,
    runtime: str | None,
    stats: bool,
    as_json: bool,
) -> None:
    """Print what the encoder at ``path`` says of each of ``texts``, a line of JSON each.

    With ``as_json`` it is one document. Without texts, every line of stdin is one.
    """
    from edgellm.encoders.model import open_encoder

    refuse_others(context, HEEDED)
    if runtime not in (None, RUNTIME):
        raise UsageError(f"--runtime {runtime}: encoders run on {RUNTIME}; leave it out")
    if list(texts) in ([], ["-"]):
        if sys.stdin.isatty():
            raise UsageError("an encoder needs texts: give them behind the path, or on stdin")
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise UsageError("there is no text on stdin: give one a line, or behind the path")
    with open_encoder(path, device=cast("Device", device), threads=threads, verify=verify) as model:
        started = time.perf_counter()
        results = model.ask(texts)
        seconds = time.perf_counter() - started
        facts = model.facts
    rows = [result.as_dict() for result in results]
    if as_json:
        render.show_json(
            {
                "task": facts.task,
                "results": rows,
                "compute_s": seconds,
                "texts_per_s": len(texts) / seconds,
            }
        )
        return
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    cut = sum(result.truncated for result in results)
    if cut:
        render.say_notes(
            [f"{render.count(cut, 'text')} cut at the model's {facts.max_tokens} tokens"]
        )
    if stats:
        tokens = sum(result.tokens for result in results)
        render.say_notes(
            [
                f"{render.count(len(texts), 'text')}, {render.count(tokens, 'token')} in "
                f"{render.duration(seconds)} ({len(texts) / seconds:.1f} texts/s)"
            ]
        )


def refuse_others(context: typer.Context, heeded: Collection[str]) -> None:
    """Raise ``UsageError`` for an option that was given and is not among those ``heeded``."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in heeded and source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"--{name.replace('_', '-')} is about other models, and means nothing to an "
                "encoder: leave it out"
            )
