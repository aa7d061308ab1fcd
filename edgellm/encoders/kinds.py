"""Encoders alone and encoders with a decoder: which plan and which conversion are whose."""

from __future__ import annotations

from pathlib import Path

from edgellm.artifact import Artifact
from edgellm.encoders.conversion import carry_out_encoder
from edgellm.encoders.finding import Found
from edgellm.encoders.planning import EncoderPlan, plan_encoder
from edgellm.errors import UsageError
from edgellm.export.writer import check_output
from edgellm.progress import Progress, unwatched
from edgellm.recipe import Recipe
from edgellm.seq2seq.conversion import Seq2SeqPlan, carry_out_seq2seq, plan_seq2seq
from edgellm.source.encoder_model import EncoderSource

AnyPlan = EncoderPlan | Seq2SeqPlan


def plan_found(recipe: Recipe, source: Found, *, threads: int | None = None) -> AnyPlan:
    """Everything that converting ``source`` by ``recipe`` will do; see ``plan_folder``."""
    if isinstance(source, EncoderSource):
        return plan_encoder(recipe, source, threads=threads)
    return plan_seq2seq(recipe, source, threads=threads)


def carry_out_found(
    plan: AnyPlan,
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of a plan that was made before; see ``carry_out``."""
    if isinstance(plan.source, EncoderSource):
        return carry_out_encoder(plan, out, force=force, check=check, progress=progress)
    return carry_out_seq2seq(plan, out, force=force, check=check, progress=progress)


def convert_found(
    recipe: Recipe,
    source: Found,
    out: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    check: bool = True,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of ``source`` that ``recipe`` asks for, in the folder ``out``.

    ``check`` runs the result and compares its outputs with the float ones. Raises any
    ``EdgeError``; then nothing is left at ``out``, and an older artifact there is untouched.
    """
    check_output(out, force=force)
    plan = plan_found(recipe, source, threads=threads)
    return carry_out_found(plan, out, force=force, check=check, progress=progress)


def refuse_imatrix(path: Path | None) -> None:
    """Raise ``UsageError`` where what was found of inputs is to be saved: nothing is looked at."""
    if path is not None:
        raise UsageError(
            f"there is no importance to save in {path}: encoders are rounded without a "
            "calibration text; leave it out"
        )


def refuse_code(trusted: bool) -> None:
    """Raise ``UsageError`` where Python of an encoder's own is trusted: none of it would be run."""
    if trusted:
        raise UsageError(
            "--trust-remote-code means nothing to an encoder, which is read and compared without "
            "Python of its own: leave it out"
        )
