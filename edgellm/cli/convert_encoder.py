"""``edgellm convert`` with an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli import render
from edgellm.cli.progress_bar import progress_shown
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.encoders.planning import EncoderPlan
    from edgellm.manifest import Artifact
    from edgellm.recipe import Recipe
    from edgellm.source.encoder_model import EncoderSource


def convert_encoder(
    asked: Recipe,
    source: EncoderSource,
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
    from edgellm.encoders.conversion import carry_out_encoder
    from edgellm.encoders.planning import plan_encoder
    from edgellm.export.writer import check_free

    if save_imatrix is not None:
        raise UsageError(
            f"there is no importance to save in {save_imatrix}: encoders are rounded without a "
            "calibration text; leave it out"
        )
    plan = plan_encoder(asked, source, threads=threads)
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
        artifact = carry_out_encoder(plan, out, force=force, check=check, progress=progress)
    if as_json:
        render.show_json({"path": artifact.path, "manifest": artifact.manifest})
    else:
        _show_artifact(artifact)
    return resolved


def _show_artifact(artifact: Artifact) -> None:
    from edgellm.encoders.quality import quality_line

    assert artifact.manifest is not None
    made, measured = artifact.manifest.artifact, artifact.manifest.measured
    render.say_notes(made.notes)
    nbytes = render.size(sum(file.nbytes for file in made.files))
    files = render.count(len(made.files), "file")
    print(f"{artifact.path}: {nbytes} in {files}, checksums in manifest.json")
    if "quality" in measured:
        render.say_notes([f"outputs: {quality_line(measured['quality'])}"])
    if "skipped" in measured.get("check", {}):
        render.say_notes([f"not tried: {measured['check']['skipped']}"])
    else:
        render.say(f'ask it: edgellm run {artifact.path} "A text." "Another one."')


def _facts(plan: EncoderPlan) -> dict[str, Any]:
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
        "task": plan.source.encoder.head.task,
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


def _show(plan: EncoderPlan) -> None:
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
            ("task", plan.source.encoder.head.task),
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
