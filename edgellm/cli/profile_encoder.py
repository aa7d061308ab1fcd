"""``edgellm profile`` with encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgellm.cli import render
from edgellm.cli.run_encoder import is_encoder, refuse_others
from edgellm.errors import OutputError, UsageError

if TYPE_CHECKING:
    from edgellm.encoders.profiling import EncoderProfile

HEEDED = frozenset(
    ("paths", "prompt_tokens", "batch", "threads", "repeat", "warmup", "output", "as_json")
)
"""Parameters of ``profile`` that mean something to encoders."""


def are_encoders(paths: Sequence[str]) -> bool:
    """Whether all ``paths`` are encoders; raises ``UsageError`` where some are and some are not."""
    found = [is_encoder(Path(path)) for path in paths]
    if any(found) and not all(found):
        other = paths[found.index(False)]
        raise UsageError(
            f"{other} is no encoder, and others are: encoders are measured apart; name either"
        )
    return all(found)


def profile_encoder(
    context: typer.Context,
    paths: Sequence[str],
    *,
    text_tokens: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int | None],
    repeat: int | None,
    warmup: int | None,
    output: Sequence[Path],
    as_json: bool,
) -> None:
    """Measure the encoders at ``paths`` and show what was found."""
    import msgspec

    from edgellm.encoders.profiling import ROUNDS, WARMUP_ROUNDS, profile_encoders

    refuse_others(context, HEEDED)
    for path in output:
        if path.suffix != ".json":
            raise OutputError(f"--output {path}: a profile of encoders is written as .json alone")
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    found = profile_encoders(
        paths,
        text_tokens=text_tokens,
        batches=batches,
        threads=threads,
        rounds=repeat or ROUNDS,
        warmup_rounds=WARMUP_ROUNDS if warmup is None else warmup,
    )
    for path in output:
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
    if as_json:
        render.show_json(found)
    else:
        _show(found)


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
