"""``edgellm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import render

if TYPE_CHECKING:
    from edgellm.inspection import Inspection
    from edgellm.manifest import Manifest, MergeEntry


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="An artifact, a .gguf, .onnx or .safetensors file, or a model folder.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what is inside an artifact or a model file.

    Metadata, every tensor with its stored type and size, bits per weight, and for an artifact where
    it came from and what was done. Headers are read, weights are not (see edgellm verify for that).

    \b
    Examples:
      edgellm inspect small
      edgellm inspect model.gguf | less
      edgellm inspect small --json | jq '.tensors[] | select(.grid == "f32")'
    """
    from edgellm.inspection import inspect as inspect_path

    found = inspect_path(path)
    if as_json:
        render.show_json(found)
        return
    _show(found)


def _show(found: Inspection) -> None:
    render.show_facts(
        (name, _text(value))
        for name, value in found.metadata.items()
        # A config's null is a key that says nothing.
        if value not in (None, (), {}, "")
        and (name != "windows" or set(value) != {None})  # most models have none in any layer
    )
    print()
    notes = any(tensor.note for tensor in found.tensors)
    render.show_table(
        ("tensor", "shape", "grid", "size", *(("note",) if notes else ())),
        [
            (
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                tensor.grid,
                render.size(tensor.nbytes),
                *((tensor.note,) if notes else ()),
            )
            for tensor in found.tensors
        ],
        right="3",
    )
    print()
    bits = f", {found.bits_per_weight:.2f} bits per weight" if found.bits_per_weight else ""
    grids = ", ".join(f"{grid} {render.size(count)}" for grid, count in found.grid_bytes.items())
    render.show_facts(
        [
            (found.kind, str(found.path)),
            ("size", render.size(found.output_bytes) + bits),
            *render.active_line(found.weights, found.active_weights),
            ("tensors", f"{len(found.tensors)}: {grids}"),
            *(_lineage(found.manifest) if found.manifest else ()),
        ]
    )
    render.show_notes(found.notes)


def _lineage(manifest: Manifest) -> list[tuple[str, str]]:
    made, base = manifest.artifact, manifest.artifact.base
    measured = manifest.measured
    from edgellm.lora.check.surviving import survival_line
    from edgellm.lora.lineage import described

    parity = made.tokenizer_parity
    verdict = "the source's own ids"
    if not parity.equal:
        verdict = f"other ids than the source's ({'; '.join(parity.mismatches or parity.known)})"
    tokenizer = f"{verdict} in {parity.cases} awkward cases"
    if not parity.cases:  # the files themselves are the source's
        tokenizer = "its files, byte by byte"
    recipe = " ".join(f"{name}={_text(value)}" for name, value in made.recipe.items() if value)
    lines = [
        ("made from", " ".join(filter(None, (base.name, base.revision, base.licence, base.url)))),
        ("base sha256", base.sha256),
        *(("merged before", f"{each.name}: {described(each)}") for each in made.merged_before),
        *(_merge_lines(made.merge, measured) if made.merge else ()),
        *(("kept beside", f"{each.file}: {described(each)}") for each in made.kept_adapters),
        ("recipe", recipe),
        ("tokenizer", tokenizer),
        ("made by", ", ".join(f"{tool} {version}" for tool, version in made.tool_versions.items())),
    ]
    if {"convert_s", "peak_memory_bytes", "threads", "platform"} <= measured.keys():
        took = render.duration(measured["convert_s"])
        memory = render.size(measured["peak_memory_bytes"])
        where = f"{measured['threads']} threads, {measured['platform']}"
        lines.append(("conversion", f"{took}, peak memory {memory}, {where}"))
    if "check" in measured:
        check = measured["check"]
        lines.append(("check", check.get("skipped") or f"{check['prompt']!r} -> {check['text']!r}"))
    if survival := survival_line(measured):
        lines.append(("survival", survival))
    if made.encoder is not None and "quality" in measured:
        from edgellm.encoders.quality import quality_line

        lines.append(("outputs", quality_line(measured["quality"])))
    if made.seq2seq is not None and "quality" in measured:
        from edgellm.seq2seq.quality import quality_line as answers_line

        lines.append(("answers", answers_line(measured["quality"])))
    return [*lines, ("sha256", manifest.sha256)]


def _merge_lines(merge: MergeEntry, measured: dict[str, Any]) -> list[tuple[str, str]]:
    from edgellm.lora.lineage import described

    lines = [
        ("adapter", f"{each.name}: {described(each)}, {each.changed_tensors} tensors")
        for each in merge.adapters
    ]
    if len(merge.adapters) > 1:
        settings = {
            name: getattr(merge, name)
            for name in ("density", "sign", "rank", "seed")
            if getattr(merge, name) is not None
        }
        lines.append(("combined by", f"{merge.method} {_text(settings)}".strip()))
    if merge.base:
        lines.append(("merge base", merge.base_reason or merge.base))
    share = measured.get("merge", {}).get("relative_change")
    if share is not None:
        lines.append(("change", f"{share:.2%} of the norm of the weights that they change"))
    return [*lines, ("merged sha256", merge.merged_sha256)]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={count}" for name, count in value.items())
    return str(value).replace("\n", "\\n")
