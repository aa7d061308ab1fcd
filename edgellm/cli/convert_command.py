"""``edgellm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import options, render
from edgellm.cli.grids_by_tensor import tensor_grids
from edgellm.cli.progress_bar import progress_shown
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.plan import Plan
    from edgellm.recipe import Recipe


def convert(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face folder, a GGUF file or a Hub id (owner/name)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to make; optional with --dry-run."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gguf, onnx, hf or mlx. Default: what the best runtime installed here runs."
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            "-q",
            metavar="[SOLVER:]GRID",
            help="How weights are rounded. Default: q4_k_m for gguf, int4-g32 for onnx.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT", help="How codes are laid out, for hf. Default: by the grid."
        ),
    ] = None,
    embed: Annotated[
        str | None, typer.Option(metavar="GRID", help="Another grid for the embedding.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="GRID", help="Another grid for the output head.")
    ] = None,
    tensor_grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=GRID",
            help="Another grid for tensors by name or pattern (blk.*.attn_v.weight). Repeatable.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose each tensor's grid for a size of all files (90MB); measures first.",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="The same for so many bits a weight (4.3)."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            metavar="TYPE",
            help="What past keys and values are kept in, for onnx: int8, or as it computes.",
        ),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="What the graph computes in, for onnx: f32 (default), f16 for GPUs.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Cap the context length.")
    ] = None,
    rope_scaling: options.RopeScaling = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a model that also sees, its language model.")
    ] = False,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Solve each layer behind float ones (default) or quantized ones.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="llama.cpp's importance matrix, in place of a calibration text."
        ),
    ] = None,
    save_imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was found out for llama.cpp (.gguf, .dat)."),
    ] = None,
    device: options.Device = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Round by gradients, then train scales and norms for so many steps (needs torch).",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[=WEIGHT]",
            help="A LoRA adapter to merge: a PEFT folder, a GGUF or a Hub id. Repeatable.",
        ),
    ] = None,
    combine: options.Combine = None,
    density: options.Density = None,
    combine_sign: options.CombineSign = None,
    combine_rank: options.CombineRank = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="Of the draw of --calibration and of a METHOD's random masks. Default: 0.",
        ),
    ] = None,
    merge_base: options.MergeBase = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Write adapters beside the base, unmerged.")
    ] = False,
    min_survival: options.MinSurvival = None,
    check_text: options.CheckText = None,
    check_tokens: options.CheckTokens = None,
    max_kld: options.MaxKld = None,
    max_ppl_increase: options.MaxPplIncrease = None,
    allow_untrained: options.AllowUntrained = False,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Read all this from a file; options override it."),
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Write what was asked, defaults filled in."),
    ] = None,
    ignore_config_key: options.IgnoreConfigKey = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python that the model brings, to compare with; never run without.",
        ),
    ] = False,
    threads: options.Workers = None,
    check: Annotated[
        bool,
        typer.Option(help="Afterwards run it, and compare its answers with the source's."),
    ] = True,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a model into a folder that runs, with proof.

    The folder holds the model, its tokenizer and manifest.json, which says what went in, what was
    done to each tensor and the checksum of every byte. It appears whole or not at all, and the
    same source, recipe and versions give the same bytes. An encoder (BERT, RoBERTa, DistilBERT, a
    folder of sentence-transformers) becomes an ONNX folder, in int8 where no GRID is named.

    \b
    GRID for gguf: f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_0 q5_1 q4_k_m q4_k_s
                   q4_0 q4_1 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s q2_k iq3_m iq3_s
                   iq3_xs iq3_xxs q2_k_s iq2_m iq2_s iq2_xs iq2_xxs iq1_m iq1_s
                   (from iq3_xs on with imatrix: or gptq: before it)
    GRID for onnx: f32 f16 int8 int8-g64 int8-g128 int8-dynamic nf4
                   int4-g32 int4-g64 int4-g128 (and -sym of each int4)
    GRID for hf:   f32 f16 bf16 nf4-dq, and int8, int4 and nf4 as for onnx
    GRID for mlx:  f32 f16 bf16 int8 int8-g64 int8-g128 int4-g64-min int4-g32-min
                   int4-g128-min (and -sym in place of -min)
    LAYOUT for hf: gptq gptq_v2 awq compressed-tensors bitsandbytes

    \b
    Examples:
      edgellm convert ./SmolLM2-135M --out small
      edgellm convert HuggingFaceTB/SmolLM2-135M-Instruct --out small
      edgellm convert model.gguf --out small --quant q5_k_m --embed q8_0
      edgellm convert ./my-model --quant int4-g64 --format onnx --dry-run
      edgellm convert ./my-model --out small --format onnx --kv-cache int8
      edgellm convert ./my-model --out small --format hf --layout awq
      edgellm convert ./my-model --out small --format mlx
      edgellm convert ./all-MiniLM-L6-v2 --out embedder
      edgellm convert ./my-model -o small -q gptq:q4_0 --calibration chats.jsonl
      edgellm convert ./my-model -o small -q gptq --fit 90MB
      edgellm convert ./my-model --out small --max-kld 0.1 --max-ppl-increase 5%
      edgellm convert ./with-python-of-its-own --out small --trust-remote-code
      edgellm convert --recipe recipe.toml --out small --json | jq .path

    \b
    Adapters (METHOD: cat linear svd ties ties_svd dare_linear dare_ties
              dare_linear_svd dare_ties_svd magnitude_prune magnitude_prune_svd):
      edgellm convert ./base --adapter ./my-lora --out small
      edgellm convert ./base --adapter ./style=0.7 --adapter ./facts -o small
      edgellm convert ./base --adapter ./a --adapter ./b --combine svd -o small
      edgellm convert ./base --adapter ./my-lora --dry-run
    """
    asked = _asked(
        recipe,
        {
            "source": source,
            "format": format,
            "quant": quant,
            "layout": layout,
            "embed": embed,
            "head": head,
            "tensor_grids": tensor_grids(tensor_grid),
            "fit": fit,
            "bits": bits,
            "kv_cache": kv_cache,
            "compute": compute,
            "context": context,
            "rope_scaling": rope_scaling,
            "text_only": text_only or None,
            "ignore_config_keys": ignore_config_key or None,
            "adapters": adapter or None,
            "combine": combine,
            "density": density,
            "sign": combine_sign,
            "combine_rank": combine_rank,
            "seed": seed,
            "merge_base": merge_base,
            "keep_adapters": keep_adapters or None,
            "allow_untrained": allow_untrained or None,
            "min_survival": min_survival,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "calibrate_on": calibrate_on,
            "imatrix": None if imatrix is None else str(imatrix),
            "device": device,
            "tune": tune,
            "check_text": check_text,
            "check_tokens": check_tokens,
            "max_kld": max_kld,
            "max_ppl_increase": _percent(max_ppl_increase),
        },
    )
    if out is None and not dry_run:
        raise UsageError("convert needs --out FOLDER (or --dry-run, to see the plan only)")
    from edgellm.export.writer import check_output
    from edgellm.plan import check_disk, make_plan

    if out is not None and not dry_run:
        check_output(out, force=force)
    from edgellm.encoders.finding import find_encoder

    with progress_shown(quiet=as_json) as progress:
        encoder = find_encoder(asked, progress=progress)
    if encoder is not None:
        from edgellm.cli.convert_encoder import convert_encoder
        from edgellm.encoders.kinds import refuse_code

        refuse_code(trust_remote_code)

        resolved = convert_encoder(
            asked,
            encoder,
            out,
            threads=threads,
            force=force,
            check=check,
            dry_run=dry_run,
            as_json=as_json,
            save_imatrix=save_imatrix,
        )
        if save_recipe is not None:
            _save(resolved, save_recipe, quiet=as_json)
        return
    with progress_shown(quiet=as_json) as progress:
        plan = make_plan(
            asked, threads=threads, trust_remote_code=trust_remote_code, progress=progress
        )
    resolved = plan.recipe
    if not as_json:
        render.say(f"{resolved.source} to {resolved.format}, {resolved.quant}")
        render.say_notes(plan.reasons)
    if dry_run:
        if out is not None:
            check_disk(plan, out)
        from edgellm.cli.plan_view import plan_facts, show_plan

        render.show_json(plan_facts(plan)) if as_json else show_plan(plan)
    else:
        assert out is not None
        artifact = _carried_out(
            plan, out, quiet=as_json, force=force, check=check, save_imatrix=save_imatrix
        )
        _show_artifact(artifact, resolved.source, as_json=as_json)
    if save_recipe is not None:
        _save(resolved, save_recipe, quiet=as_json)


def _carried_out(plan: Plan, out: Path, *, quiet: bool, **choices: Any) -> Artifact:
    """Carry the plan out; says what an earlier run left, and what this one leaves when stopped."""
    from edgellm.conversion import carry_out
    from edgellm.conversion_resuming import begun_blocks

    if begun := begun_blocks(plan, out):
        _say(f"goes on with what an earlier run began: {len(begun)} blocks are done", quiet)
    try:
        with progress_shown(quiet=quiet) as progress:
            return carry_out(plan, out, progress=progress, **choices)
    except KeyboardInterrupt:
        if begun := begun_blocks(plan, out):
            _say(
                f"{len(begun)} blocks are done and kept: the same command goes on from there, "
                f"another one with --out {out} discards them",
                quiet,
            )
        raise


def _say(note: str, quiet: bool) -> None:
    if not quiet:
        render.say_notes([note])


def _asked(recipe_file: Path | None, options: dict[str, Any]) -> Recipe:
    from edgellm.recipe import load_recipe, make_recipe

    if recipe_file is not None:
        return load_recipe(recipe_file, options)
    if options["source"] is None:
        raise UsageError("convert needs a SOURCE (or --recipe FILE.toml that names one)")
    return make_recipe(options)


def _percent(text: str | None) -> float | None:
    """``5%`` or ``5`` as 5.0."""
    if text is None:
        return None
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise UsageError(
            f"--max-ppl-increase is a percentage, such as 5%, and {text!r} is none"
        ) from error


def _save(recipe: Recipe, path: Path, *, quiet: bool) -> None:
    from edgellm.recipe import save_recipe

    save_recipe(recipe, path)
    if not quiet:
        render.say(f"recipe written to {path}")


def _tuned(tuned: dict[str, Any]) -> str:
    """What tuning gained, in a line."""
    if tuned["kl_before"] is None:
        return f"{tuned['blocks']} blocks kept as trained"
    before, after = tuned["kl_before"], tuned["kl_after"]
    if not tuned["kept_share"] and not tuned["blocks"]:
        return f"nothing kept, held-out KL {before:.4g} was not bettered"
    return f"held-out KL {before:.4g} to {after:.4g}"


def _own_code(found: dict[str, Any]) -> str:
    """How near edgellm's reading is to the model's own Python, in a line."""
    if "skipped" in found:
        return f"not compared with the model's own Python: {found['skipped']}"
    return (
        f"as the model's own Python computes it: logits {found['logit_error']:.1e} of their spread "
        f"apart, top-1 {found['top1_agreement']:.0%} ({found['tokens']} tokens)"
    )


def _show_artifact(artifact: Artifact, source: str, *, as_json: bool) -> None:
    assert artifact.manifest is not None
    if as_json:
        render.show_json({"path": artifact.path, "manifest": artifact.manifest})
        return
    made = artifact.manifest.artifact
    check = artifact.manifest.measured.get("check", {})
    render.say_notes((*artifact.manifest.measured.get("notes", ()), *made.notes))
    nbytes = render.size(sum(file.nbytes for file in made.files))
    files = render.count(len(made.files), "file")
    print(f"{artifact.path}: {nbytes} in {files}, checksums in manifest.json")
    from edgellm.lora.lineage import described

    render.say_notes(f"kept beside: {each.file}, {described(each)}" for each in made.kept_adapters)
    if own_code := artifact.manifest.measured.get("remote_code"):
        render.say_notes([_own_code(own_code)])
    if "text" in check:
        render.say_notes([f'it runs: "{" ".join((check["prompt"] + check["text"]).split())} ..."'])
    from edgellm.quality_gate import quality_line

    if answers := quality_line(artifact.manifest.measured, str(artifact.path), source):
        render.say_notes([f"answers: {answers}"])
    if tuned := artifact.manifest.measured.get("tuning"):
        render.say_notes([f"tuned: {_tuned(tuned)}"])
    from edgellm.lora.check.surviving import survival_line

    if survival := survival_line(artifact.manifest.measured):
        render.say_notes([f"survival: {survival}"])
    if "skipped" in check:
        render.say_notes([f"not tried: {check['skipped']}"])
    else:
        render.say(f'ask it: edgellm run {artifact.path} "Why is the sky blue?"')
