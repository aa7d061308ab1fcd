"""``edgellm profile`` with encoders, alone or with a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from edgellm.cli import render
from edgellm.cli.run_encoder import is_encoder, refuse_others
from edgellm.cli.run_seq2seq import is_seq2seq
from edgellm.errors import OutputError, UsageError

if TYPE_CHECKING:
    from edgellm.encoders.profiling import EncoderProfile
    from edgellm.seq2seq.profiling import Seq2SeqProfile

Kind = Literal["encoder", "seq2seq", "language model"]

HEEDED = frozenset(("paths", "prompt_tokens", "threads", "repeat", "warmup", "output", "as_json"))
"""Parameters of ``profile`` that mean something to all of them."""

TOKENS = 128
"""Length of the texts that they are measured on, where none is named."""

NEW_TOKENS = 64
"""Length of a decoder's answers, likewise."""


def kind_of(paths: Sequence[str]) -> Kind:
    """What all ``paths`` are; raises ``UsageError`` where they are not of one kind."""
    found = [_kind_of(Path(path)) for path in paths]
    other = next((place for place, kind in enumerate(found) if kind != found[0]), None)
    if other is not None:
        raise UsageError(
            f"{paths[0]} is of another kind ({found[0]}) than {paths[other]} ({found[other]}): "
            "they are measured apart; name one kind"
        )
    return found[0]


def _kind_of(path: Path) -> Kind:
    if is_encoder(path):
        return "encoder"
    return "seq2seq" if is_seq2seq(path) else "language model"


def given(context: typer.Context, name: str) -> bool:
    """Whether the option ``name`` stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def profile_encoder(
    context: typer.Context,
    paths: Sequence[str],
    *,
    text_tokens: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int | None],
    repeat: int | None,
    warmup: int,
    output: Sequence[Path],
    as_json: bool,
) -> None:
    """Measure the encoders at ``paths`` and show what was found."""
    from edgellm.encoders.profiling import ROUNDS, profile_encoders

    refuse_others(context, HEEDED | {"batch"})
    _check(output)
    found = profile_encoders(
        paths,
        text_tokens=text_tokens,
        batches=batches,
        threads=threads,
        rounds=repeat or ROUNDS,
        warmup_rounds=warmup,
    )
    _write(found, output)
    render.show_json(found) if as_json else _show(found)


def profile_with_decoder(
    context: typer.Context,
    paths: Sequence[str],
    *,
    text_tokens: Sequence[int],
    new_tokens: Sequence[int],
    threads: Sequence[int | None],
    repeat: int | None,
    warmup: int,
    output: Sequence[Path],
    as_json: bool,
) -> None:
    """Measure the encoders with a decoder at ``paths`` and show what was found."""
    from edgellm.seq2seq.profiling import ROUNDS, profile_seq2seq

    refuse_others(context, HEEDED | {"new_tokens"})
    _check(output)
    found = profile_seq2seq(
        paths,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        threads=threads,
        rounds=repeat or ROUNDS,
        warmup_rounds=warmup,
    )
    _write(found, output)
    render.show_json(found) if as_json else _show_answers(found)


def _check(output: Sequence[Path]) -> None:
    """Raise ``OutputError`` before any work for what could not be written after it."""
    for path in output:
        if path.suffix != ".json":
            raise OutputError(f"--output {path}: a profile of encoders is written as .json alone")
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")


def _write(found: EncoderProfile | Seq2SeqProfile, output: Sequence[Path]) -> None:
    import msgspec

    for path in output:
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _show(found: EncoderProfile) -> None:
    render.show_table(
        ("cell", "load", "batch", "texts/s", "tokens/s", "size"),
        [
            (
                cell.name,
                render.duration(cell.load_s),
                f"{cell.batch_s.median * 1e3:.2f} ms",
                f"{cell.texts_per_s.median:,.1f}",
                f"{cell.tokens_per_s.median:,.0f}",
                render.size(cell.size_bytes),
            )
            for cell in found.cells
        ],
        right="12345",
    )
    render.show_notes(f"noisy: {reason}" for reason in found.noisy)


def _show_answers(found: Seq2SeqProfile) -> None:
    render.show_table(
        ("cell", "load", "first token", "decode", "whole answer", "size"),
        [
            (
                cell.name,
                render.duration(cell.load_s),
                f"{cell.first_token_s.median * 1e3:.1f} ms",
                f"{cell.decode_tokens_per_s.median:,.1f} tokens/s",
                render.duration(cell.end_to_end_s.median),
                render.size(cell.size_bytes),
            )
            for cell in found.cells
        ],
        right="12345",
    )
    render.show_notes(f"noisy: {reason}" for reason in found.noisy)
