"""``edgellm run`` with an encoder and a decoder (T5, BART, Marian): a text in, another out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from edgellm.cli import render
from edgellm.cli.run_encoder import RUNTIME, refuse_others
from edgellm.errors import SourceError, UsageError

if TYPE_CHECKING:
    from edgellm.runtimes.session import Device
    from edgellm.sampling import SamplingOptions

HEEDED = frozenset(
    (
        "path", "prompt", "words", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
        "repeat_penalty", "device", "threads", "verify", "stats", "as_json", "runtime", "raw",
        "source_lang", "target_lang",
    )
)  # fmt: skip
"""Parameters of ``run`` that mean something to such a model."""


def is_seq2seq(path: Path) -> bool:
    """Whether ``path`` is such a model's artifact; what is no artifact is left to others."""
    from edgellm.artifact import open_artifact

    try:
        return open_artifact(path).seq2seq is not None
    except SourceError:
        return False


def run_seq2seq(
    context: typer.Context,
    path: Path,
    text: str | None,
    sampling: SamplingOptions,
    *,
    max_tokens: int | None,
    source_language: str | None,
    target_language: str | None,
    device: str,
    threads: int | None,
    verify: bool,
    runtime: str | None,
    stats: bool,
    as_json: bool,
) -> None:
    """Print what the model at ``path`` answers to ``text``, or to stdin."""
    from edgellm.seq2seq.model import open_seq2seq

    refuse_others(context, HEEDED)
    if runtime not in (None, RUNTIME):
        raise UsageError(f"--runtime {runtime}: encoders run on {RUNTIME}; leave it out")
    if text is None and sys.stdin.isatty():
        raise UsageError("a model with an encoder needs a text: give it behind the path")
    if text in (None, "-"):
        text = sys.stdin.read().strip()
    if not text:
        raise UsageError("the text on stdin is empty: give one behind the path")
    with open_seq2seq(path, device=cast("Device", device), threads=threads, verify=verify) as model:
        answer = model.generate(
            text,
            max_tokens=max_tokens,
            sampling=sampling,
            source_language=source_language,
            target_language=target_language,
        )
        facts = model.facts
    if as_json:
        render.show_json(answer.as_dict())
        return
    print(answer.text)
    if answer.truncated:
        render.say_notes([f"the text was cut at the model's {facts.max_tokens} tokens"])
    if answer.finish_reason == "length" and len(answer.token_ids) != max_tokens:
        render.say_notes([f"cut: {len(answer.token_ids)} tokens (--max-tokens NUMBER)"])
    begun = {facts.start_token_id, *facts.first_token_ids}
    if target_language is None and facts.languages and not begun & {*facts.languages.values()}:
        render.say_notes(
            ["no language was named, and the model was left to choose (--target-lang)"]
        )
    if stats:
        new, rest_s = len(answer.token_ids), answer.end_to_end_s - answer.first_token_s
        speed = f", {(new - 1) / rest_s:.1f} tokens/s" if new > 1 and rest_s else ""
        render.say_notes(
            [
                f"first token after {render.duration(answer.first_token_s)} "
                f"({render.count(answer.prompt_tokens, 'token')} of text)",
                f"{new} new tokens{speed}",
            ]
        )
