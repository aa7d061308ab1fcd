"""``edgellm merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options, render
from edgellm.cli.progress_bar import progress_shown
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.folder_merge import MergePlan


def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A Hugging Face folder or a Hub id (owner/name).")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[=WEIGHT]",
            help="The adapter to merge: a PEFT folder, a GGUF or a Hub id. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to make; optional with --dry-run."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="f32, f16 or bf16. Default: each tensor keeps its own."),
    ] = None,
    combine: options.Combine = None,
    density: options.Density = None,
    combine_sign: options.CombineSign = None,
    combine_rank: options.CombineRank = None,
    seed: options.Seed = None,
    merge_base: options.MergeBase = None,
    allow_untrained: options.AllowUntrained = False,
    ignore_config_key: options.IgnoreConfigKey = None,
    threads: options.Workers = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Merge adapters into a folder that transformers loads.

    Shards, names and dtypes are the base's: tensors that no adapter changes are copied byte for
    byte, the others are computed in float32 and rounded once. It needs no torch, the memory of a
    slab of rows, and works for any architecture. manifest.json says what went in and the checksum
    of every byte. To run the result: edgellm convert.

    \b
    METHOD: cat linear svd ties ties_svd dare_linear dare_ties dare_linear_svd
            dare_ties_svd magnitude_prune magnitude_prune_svd

    \b
    Examples:
      edgellm merge ./base --adapter ./my-lora --out merged
      edgellm merge owner/base --adapter owner/lora --out merged
      edgellm merge ./base --adapter ./style=0.7 --adapter ./facts -o merged
      edgellm merge ./base --adapter ./a --adapter ./b --combine svd -o merged
      edgellm merge ./base --adapter ./my-lora --dtype f32 --dry-run
    """
    if not adapter:
        raise UsageError("merge needs at least one --adapter PATH[=WEIGHT]")
    if out is None and not dry_run:
        raise UsageError("merge needs --out FOLDER (or --dry-run, to see the plan only)")
    from edgellm.folder_merge import carry_out, make_plan
    from edgellm.recipe import make_recipe

    recipe = make_recipe(
        {
            "source": base,
            "format": "hf",
            "quant": dtype,
            "adapters": adapter,
            "combine": combine,
            "density": density,
            "sign": combine_sign,
            "combine_rank": combine_rank,
            "seed": seed,
            "merge_base": merge_base,
            "allow_untrained": allow_untrained or None,
            "ignore_config_keys": ignore_config_key or None,
        }
    )
    with progress_shown(quiet=as_json) as progress:
        plan = make_plan(recipe, out, threads=threads, force=force, progress=progress)
        if not dry_run:
            assert out is not None
            artifact = carry_out(plan, out, force=force, progress=progress)
    if dry_run:
        render.show_json(_plan_facts(plan)) if as_json else _show_plan(plan)
    else:
        _show_artifact(artifact, as_json=as_json)


def _plan_facts(plan: MergePlan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe,
        "base": plan.base,
        "adapters": plan.adapter_entries(),
        "combination": plan.combination,
        "merged_before": plan.merged_before,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "threads": plan.threads,
        "notes": plan.notes,
        "changed": plan.changed,
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
    }


def _show_plan(plan: MergePlan) -> None:
    from edgellm.lora.lineage import described

    tensors = sum(len(shard.tensors) for shard in plan.shards)
    render.show_facts(
        [
            ("base", plan.base.name),
            *(
                ("adapter", f"{entry.name}: {described(entry)}, {entry.changed_tensors} tensors")
                for entry in plan.adapter_entries()
            ),
            ("combined by", plan.combination.method if len(plan.adapters) > 1 else ""),
            ("adapters change", f"{len(plan.changed)} of {tensors} tensors"),
            ("shards", str(len(plan.shards))),
            ("size", render.size(plan.output_bytes)),
            ("peak memory", f"about {render.size(plan.peak_memory_bytes)}"),
            ("threads", str(plan.threads)),
        ]
    )
    render.show_notes(plan.notes)


def _show_artifact(artifact: Artifact, *, as_json: bool) -> None:
    assert artifact.manifest is not None
    if as_json:
        render.show_json({"path": artifact.path, "manifest": artifact.manifest})
        return
    made = artifact.manifest.artifact
    render.say_notes((*artifact.manifest.measured.get("notes", ()), *made.notes))
    changed = sum(bool(tensor.note) for tensor in made.tensors)
    share = artifact.manifest.measured["vanished"]["share"]
    if share is not None:
        render.say_notes([f"{share:.1%} of the changed values are the same after rounding"])
    nbytes = render.size(sum(file.nbytes for file in made.files))
    print(
        f"{artifact.path}: {nbytes} in {render.count(len(made.files), 'file')}, "
        f"{changed} of {len(made.tensors)} tensors merged, checksums in manifest.json"
    )
    render.say(f"make it run here: edgellm convert {artifact.path} --out DIR")
