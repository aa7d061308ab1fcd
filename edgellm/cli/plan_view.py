"""A plan as ``convert --dry-run`` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgellm.cli import render
from edgellm.cli.grids_by_tensor import show_fit

if TYPE_CHECKING:
    from edgellm.calibration.planning import Calibration
    from edgellm.lora.merging import Merge
    from edgellm.manifest import KeptEntry
    from edgellm.plan import Plan
    from edgellm.tune.planning import Tuning


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What ``--dry-run --json`` prints."""
    return {
        "recipe": plan.recipe,
        "reasons": plan.reasons,
        "container": plan.layout.container,
        "context_length": plan.layout.context_length,
        "output_bytes": plan.output_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "active_weights": plan.active_weights,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "convert_s": plan.seconds,
        "threads": plan.threads,
        "notes": plan.notes,
        "calibration": _calibration_facts(plan.calibration) if plan.calibration else None,
        "tuning": _tuning_facts(plan.tuning) if plan.tuning else None,
        "fit": plan.fitted.figures() if plan.fitted else None,
        "merge": _merge_facts(plan.source.merge) if plan.source.merge else None,
        "merged_before": plan.source.merged_before,
        "kept_adapters": _kept(plan),
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


def _calibration_facts(calibration: Calibration) -> dict[str, Any]:
    text, given, cost = calibration.text, calibration.given, calibration.cost
    if text is None:
        return {
            "imatrix": given and given.name,
            "imatrix_sha256": given and given.sha256,
            "gathered": calibration.needs,
        }
    return {
        "text": text.name,
        "text_sha256": text.text_sha256,
        "ids_sha256": text.sha256,
        "tokens": text.tokens,
        "windows": len(text.windows),
        "seed": text.seed,
        "gathered": calibration.needs,
        "layers": calibration.layers,
        "calibrate_s": cost.seconds,
        "memory_bytes": cost.memory_bytes,
        "spool_bytes": cost.disk_bytes,
    }


def _tuning_facts(tuning: Tuning) -> dict[str, Any]:
    return {
        "settings": tuning.settings,
        "text": tuning.text.name,
        "ids_sha256": tuning.text.sha256,
        "whole": tuning.whole,
        "recompute": tuning.recompute,
        "memory_bytes": tuning.memory_bytes,
        "tune_s": tuning.seconds,
    }


def _kept(plan: Plan) -> tuple[KeptEntry, ...]:
    from edgellm.lora.lineage import kept_entries

    return kept_entries(plan.layout)


def _merge_facts(merge: Merge) -> dict[str, Any]:
    from edgellm.lora.lineage import adapter_entries

    return {
        "adapters": adapter_entries(merge),
        "combination": merge.combination,
        "changed": merge.changed,
    }


def show_plan(plan: Plan) -> None:
    """Print what ``--dry-run`` shows: every tensor, then what the whole takes."""
    from edgellm.lora.lineage import described

    render.show_table(
        ("tensor", "shape", "grid", "size", "note"),
        [
            (
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                tensor.grid.name,
                render.size(tensor.nbytes),
                tensor.note,
            )
            for tensor in plan.layout.tensors
        ],
        right="3",
    )
    print()
    render.show_facts(
        [
            ("tensors", str(len(plan.layout.tensors))),
            ("size", render.size(plan.output_bytes)),
            *_weights_line(plan),
            ("bits per weight", f"{plan.bits_per_weight:.2f}"),
            ("context", f"{plan.layout.context_length} tokens"),
            ("peak memory", f"about {render.size(plan.peak_memory_bytes)}"),
            ("disk needed", render.size(plan.disk_bytes)),
            ("time", f"about {render.duration(plan.seconds)}"),
            ("threads", str(plan.threads)),
            *(_calibration_lines(plan.calibration) if plan.calibration else ()),
            *(_tuning_lines(plan.tuning) if plan.tuning else ()),
            *(_merge_lines(plan) if plan.source.merge else ()),
            *(("kept beside", f"{each.file}: {described(each)}") for each in _kept(plan)),
        ]
    )
    render.show_notes(plan.notes)
    if plan.fitted is not None:
        show_fit(plan.fitted)


def _weights_line(plan: Plan) -> list[tuple[str, str]]:
    """How many weights there are, and how many a token passes, where these are not all."""
    has_experts = any(layer.experts for layer in plan.source.decoder.layers)
    weights = sum(ref.size for ref in plan.source.tensors.values())
    return render.active_line(weights, plan.active_weights) if has_experts else []


def _calibration_lines(calibration: Calibration) -> list[tuple[str, str]]:
    text, given, cost = calibration.text, calibration.given, calibration.cost
    if text is None:
        return [("importance", f"of {given.name}")] if given else []
    behind = f", behind {calibration.layers} layers" if calibration.follows else ""
    return [
        (
            "calibration",
            f"{text.name}: {text.tokens} tokens in {len(text.windows)} windows{behind}",
        ),
        (
            "",
            f"about {render.duration(cost.seconds)}, {render.size(cost.disk_bytes)} to resume from",
        ),
    ]


def _tuning_lines(tuning: Tuning) -> list[tuple[str, str]]:
    settings, text = tuning.settings, tuning.text
    steps = f"{settings.steps} steps end to end" if tuning.whole else ""
    blocks = f"{settings.block_steps} steps for each block" if settings.block_steps else ""
    coupled = f"codes by gradients of {settings.gradient_tokens} tokens"
    parts = (coupled if settings.gradient_tokens else "", blocks, steps)
    what = ", then ".join(part for part in parts if part)
    return [
        ("tuning", f"{what}, on {text.name}: {text.tokens} tokens"),
        ("", f"about {render.duration(tuning.seconds)}, {render.size(tuning.memory_bytes)} memory"),
    ]


def _merge_lines(plan: Plan) -> list[tuple[str, str]]:
    from edgellm.lora.lineage import adapter_entries, described

    merge = plan.source.merge
    assert merge is not None
    lines = [
        ("adapter", f"{entry.name}: {described(entry)}, {entry.changed_tensors} tensors")
        for entry in adapter_entries(merge)
    ]
    if len(merge.adapters) > 1:
        lines.append(("combined by", merge.combination.method))
    changed = f"{len(merge.changed)} of {len(plan.source.tensors)} weights of the model"
    return [*lines, ("adapters change", changed)]
