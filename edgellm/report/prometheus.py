"""Profiles in Prometheus' text exposition format, as a push gateway takes it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from edgellm.profiling.document import Profile
from edgellm.report.quantities import FIGURES, Quantity
from edgellm.report.rows import Row, rows

UNITS = {"s": "seconds", "tokens/s": "tokens_per_second", "texts/s": "texts_per_second"}
SUFFIXES = ("_tokens_per_s", "tokens_per_s", "texts_per_s", "_s")

BOUNDS = {
    "median": ("", "median of the rounds"),
    "low": ("_low", "lower end of the median's interval"),
    "high": ("_high", "upper end of the median's interval"),
}
"""Parts of a figure: what its gauge's name ends in, and what its help says."""

QUANTILES = {"p50": "0.5", "p90": "0.9", "p95": "0.95", "p99": "0.99", "max": "1"}

Sample = tuple[dict[str, str], float]
"""Labels and value of one sample."""


def prometheus(profiles: Sequence[Profile]) -> str:
    """Gauges, each with its help and type once; a sample for each cell that has the figure."""
    found = rows(profiles)
    gauges: list[tuple[str, str, list[Sample]]] = []
    for quantity in FIGURES:
        for part, (ending, words) in BOUNDS.items():
            samples = [
                (_labels(row), float(getattr(figure, part)))
                for row in found
                if (figure := quantity.of(row.cell))
            ]
            text = f"{quantity.words.capitalize()}: {words}."
            gauges.append((f"{gauge_name(quantity)}{ending}", text, samples))
    gauges += [
        (
            "edgellm_inter_token_latency_seconds",
            "Time from one token's text to the next one's, by quantile of all samples.",
            _quantiles(found, "inter_token_latency_s"),
        ),
        (
            "edgellm_batch_latency_seconds",
            "Time from a batch's texts to what an encoder says, by quantile of all samples.",
            _quantiles(found, "latency_s"),
        ),
        *_memory(found),
        (
            "edgellm_artifact_size_bytes",
            "Size of all files of the artifact.",
            [(_labels(row), float(row.cell.artifact.size_bytes)) for row in found],
        ),
        (
            "edgellm_artifact_kl_divergence_nats",
            "KL divergence of the artifact's answers to its source's.",
            [
                (_labels(row), kld)
                for row in found
                if (kld := row.cell.artifact.kld_mean) is not None
            ],
        ),
        (
            "edgellm_decode_energy_joules_per_token",
            "Energy of a decoded token: median of the rounds.",
            [
                (_labels(row), row.cell.energy.decode_j_per_token.median)
                for row in found
                if row.cell.energy
            ],
        ),
        (
            "edgellm_cell_failed",
            "1 where the cell failed.",
            [(_labels(row), float(bool(row.cell.failure))) for row in found],
        ),
        (
            "edgellm_cell_noisy",
            "1 where the cell's figures may mislead.",
            [(_labels(row), float(bool(row.cell.noisy))) for row in found],
        ),
        (
            "edgellm_profile_started_timestamp_seconds",
            "When measuring started, in seconds since 1970.",
            [(_labels(row), at) for row in found if (at := _started(row)) is not None],
        ),
    ]
    return "".join(_written(*gauge) for gauge in gauges if gauge[2])


def gauge_name(quantity: Quantity) -> str:
    """``edgellm_decode_tokens_per_second``: the field with its unit in full."""
    suffix = next(each for each in SUFFIXES if quantity.field.endswith(each))
    of = quantity.field.removesuffix(suffix) or "encoder"
    return f"edgellm_{of}_{UNITS[quantity.unit]}"


def _quantiles(found: Sequence[Row], field: str) -> list[Sample]:
    """Samples of the distribution ``field`` of every cell that has it."""
    return [
        ({**_labels(row), "quantile": quantile}, float(getattr(known, part)))
        for row in found
        if (known := getattr(row.cell, field))
        for part, quantile in QUANTILES.items()
    ]


def _memory(found: Sequence[Row]) -> list[tuple[str, str, list[Sample]]]:
    parts = {
        "peak": "Most memory that was resident at once, mapped file pages counted.",
        "steady": "Memory resident after the last round.",
        "kv": "Keys and values.",
    }
    return [
        (
            f"edgellm_memory_{part}_bytes",
            text,
            [
                (_labels(row), float(taken))
                for row in found
                if (taken := getattr(row.cell.memory, f"{part}_bytes", None)) is not None
            ],
        )
        for part, text in parts.items()
    ]


def _labels(row: Row) -> dict[str, str]:
    cell = row.cell
    return {
        "cell": row.name,
        "machine": row.machine,
        "artifact": cell.artifact.name,
        "quant": cell.artifact.quant,
        "container": cell.artifact.container,
        "runtime": cell.settings.runtime,
        "device": cell.settings.device,
        "threads": str(cell.settings.threads or ""),
        "prompt_tokens": str(cell.settings.prompt_tokens),
        "new_tokens": str(cell.settings.new_tokens),
        "depth_tokens": str(cell.settings.depth_tokens),
        "task": cell.settings.task,
        "batch": str(cell.settings.batch),
    }


def _started(row: Row) -> float | None:
    try:
        return datetime.fromisoformat(row.profile.started).timestamp()
    except ValueError:
        return None


def _written(name: str, text: str, samples: Sequence[Sample]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(each)}"' for label, each in labels.items())
        lines.append(f"{name}{{{inside}}} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
