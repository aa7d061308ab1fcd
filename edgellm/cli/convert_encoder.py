"""``edgellm convert`` with an encoder, alone or with a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli import render
from edgellm.cli.progress_bar import progress_shown

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.encoders.finding import Found
    from edgellm.encoders.kinds import AnyPlan
    from edgellm.recipe import Recipe


def convert_encoder(
    asked: Recipe,
    source: Found,
    out: Path | None,
    *,
    threads: int | None,
    force: bool,
    check: bool,
    dry_run: bool,
    as_json: bool,
    save_imatrix: Path | None,
) -> Recipe:
    """Convert ``source`` or show its plan; the recipe with its defaults filled in."""
    from edgellm.encoders.kinds import carry_out_found, plan_found, refuse_imatrix
    from edgellm.export.writer import check_free

    refuse_imatrix(save_imatrix)
    plan = plan_found(asked, source, threads=threads)
    resolved = plan.recipe
    if not as_json:
        render.say(f"{resolved.source} to {resolved.format}, {resolved.quant}")
        render.say_notes(plan.reasons)
    if dry_run:
        if out is not None:
            check_free(out, plan.disk_bytes)
        render.show_json(_facts(plan)) if as_json else _show(plan)
        return resolved
    assert out is not None
    with progress_shown(quiet=as_json) as progress:
        artifact = carry_out_found(plan, out, force=force, check=check, progress=progress)
    if as_json:
        render.show_json({"path": artifact.path, "manifest": artifact.manifest})
    else:
        _show_artifact(artifact)
    return resolved


def _show_artifact(artifact: Artifact) -> None:
    assert artifact.manifest is not None
    made, measured = artifact.manifest.artifact, artifact.manifest.measured
    render.say_notes((*artifact.manifest.measured.get("notes", ()), *made.notes))
    nbytes = render.size(sum(file.nbytes for file in made.files))
    files = render.count(len(made.files), "file")
    print(f"{artifact.path}: {nbytes} in {files}, checksums in manifest.json")
    if "quality" in measured:
        render.say_notes([_quality(measured["quality"], made.seq2seq is not None)])
    if "skipped" in measured.get("check", {}):
        render.say_notes([f"not tried: {measured['check']['skipped']}"])
    else:
        more = "" if made.seq2seq is not None else ' "Another one."'
        render.say(f'ask it: edgellm run {artifact.path} "A text."{more}')


def _quality(found: dict[str, Any], answers: bool) -> str:
    if answers:
        from edgellm.seq2seq.quality import quality_line as answers_line

        return f"answers: {answers_line(found)}"
    from edgellm.encoders.quality import quality_line

    return f"outputs: {quality_line(found)}"


def _task(plan: AnyPlan) -> str:
    """What the model is for, in a word."""
    from edgellm.source.encoder_model import EncoderSource

    source = plan.source
    return source.encoder.head.task if isinstance(source, EncoderSource) else "seq2seq"


def _facts(plan: AnyPlan) -> dict[str, Any]:
    """What ``--dry-run --json`` prints."""
    return {
        "recipe": plan.recipe,
        "reasons": plan.reasons,
        "container": plan.layout.container,
        "context_length": plan.layout.context_length,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "convert_s": plan.seconds,
        "threads": plan.threads,
        "notes": plan.notes,
        "task": _task(plan),
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "shape": tensor.shape,
                "grid": tensor.grid.name,
                "nbytes": tensor.nbytes,
                "note": tensor.note,
            }
            for tensor in plan.layout.tensors
        ],
    }


def _show(plan: AnyPlan) -> None:
    render.show_table(
        ("tensor", "shape", "grid", "size"),
        [
            (
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                tensor.grid.name,
                render.size(tensor.nbytes),
            )
            for tensor in plan.layout.tensors
        ],
        right="3",
    )
    print()
    render.show_facts(
        [
            ("task", _task(plan)),
            ("tensors", str(len(plan.layout.tensors))),
            ("size", render.size(plan.output_bytes)),
            ("bits per weight", f"{plan.bits_per_weight:.2f}"),
            ("longest text", f"{plan.layout.context_length} tokens"),
            ("peak memory", f"about {render.size(plan.peak_memory_bytes)}"),
            ("disk needed", render.size(plan.disk_bytes)),
            ("time", f"about {render.duration(plan.seconds)}"),
            ("threads", str(plan.threads)),
        ]
    )
    render.show_notes(plan.notes)
