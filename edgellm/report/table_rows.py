"""Profiles as CSV: a row for each cell, plain names with units, values as they were measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from edgellm.profiling.document import Figure, Profile
from edgellm.report.quantities import FIGURES, PERCENTILES, SPREADS
from edgellm.report.rows import Row, rows

Value = str | int | float | None

ENERGY = ("prefill_j", "decode_j", "decode_j_per_token")
ROOFLINE = ("bytes_per_token", "decode_share", "flops_per_token", "prefill_share")
MEMORY = ("peak_bytes", "steady_bytes", "steady_shared_bytes", "device_bytes", "kv_bytes")


def csv_text(profiles: Sequence[Profile]) -> str:
    """The table with its header; what a cell does not have is empty."""
    found = [_values(row) for row in rows(profiles)]
    out = io.StringIO(newline="")
    names = list(found[0]) if found else ["cell"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def _values(row: Row) -> dict[str, Value]:
    cell, artifact, settings = row.cell, row.cell.artifact, row.cell.settings
    values: dict[str, Value] = {
        "cell": cell.name,
        "machine": row.machine,
        "started": row.profile.started,
        "edgellm": row.profile.edgellm,
        "artifact": artifact.name,
        "container": artifact.container,
        "quant": artifact.quant,
        "sha256": artifact.sha256,
        "model_sha256": artifact.model_sha256,
        "size_bytes": artifact.size_bytes,
        "weights": artifact.weights,
        "weight_bytes": artifact.weight_bytes,
        "kld_mean_nats": artifact.kld_mean,
        "runtime": settings.runtime,
        "runtime_version": cell.runtime_version,
        "device": settings.device,
        "threads": settings.threads,
        "kv_cache": settings.kv_cache,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "depth_tokens": settings.depth_tokens,
        "task": settings.task,
        "batch": settings.batch,
        "rounds": cell.rounds,
        "warmup_rounds": cell.warmup_rounds,
    }
    for quantity in FIGURES:
        values |= _figure(quantity.field, quantity.of(cell))
    for field in SPREADS:
        for name in PERCENTILES:
            values[f"{field}_{name}"] = getattr(getattr(cell, field), name, None)
    for name in MEMORY:
        values[f"memory_{name}"] = getattr(cell.memory, name, None)
    values["energy_source"] = getattr(cell.energy, "source", None)
    for name in ENERGY:
        values |= _figure(f"energy_{name}", getattr(cell.energy, name, None))
    for name in ROOFLINE:
        values[f"roofline_{name}"] = getattr(cell.roofline, name, None)
    values["noisy"] = "; ".join(cell.noisy)
    values["failure"] = cell.failure
    values["text_sha256"] = cell.text_sha256
    return values


def _figure(name: str, figure: Figure | None) -> dict[str, Value]:
    return {f"{name}_{part}": getattr(figure, part, None) for part in ("median", "low", "high")}
