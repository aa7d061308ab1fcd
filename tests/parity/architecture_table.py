"""The tables of docs/architectures.md, made from the families' files and from what was measured.

`python architecture_table.py`, here and with the project on PYTHONPATH, measures every tiny model
anew (``measured_errors.json``) and writes the document.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np

from edgellm.architectures import FAMILIES, REFUSED, family_named
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Feature
from edgellm.export.mlx_models import GRAPHS as MLX_GRAPHS
from edgellm.json_file import read_json

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "architectures.md"
MEASURED = HERE / "measured_errors.json"
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)

LENGTH = 100
WAYS: tuple[tuple[int, ...], ...] = ((), (3,), (40, 17))
"""Tokens at a time: all of them; one by one behind a short prompt; chunks with a past."""

UNSAID = {Feature.ROPE, Feature.RMS_NORM, Feature.GATED_MLP}
"""What most families have, so that the table is shorter without."""


def fill(text: str) -> str:
    """``text`` with its tables made anew."""
    tables = {"families": _families, "refused": _refused}
    return MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", text)


def write() -> None:
    """Make the tables in the document anew."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def measure() -> None:
    """Find the largest difference to transformers' logits of each model, through each container."""
    import llamacpp_logits
    import onnx_files
    import tiny_models
    from gguf_files import write_gguf

    from edgellm.errors import UnsupportedTarget

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny_model = tiny_models.builder(Path(scratch))
        for name in tiny_models.MODELS:
            folder, here = tiny_model(name), Path(scratch)
            ids = tiny_models.some_token_ids(LENGTH)
            wanted = tiny_models.reference_logits(folder, ids)
            config = read_json(folder / "config.json")
            family = family_named(config["model_type"])
            decoder = family.describe(Config(config))
            entry = {
                "family": family.model_type,
                "features": sorted(map(str, decoder.features())),
                "spread": float(wanted.std()),
            }
            onnx_files.write_onnx(folder, here / f"{name}-onnx")
            entry["onnx"] = max(
                float(np.abs(onnx_files.logits(here / f"{name}-onnx", ids, steps) - wanted).max())
                for steps in WAYS
            )
            try:
                layout = write_gguf(folder, here / f"{name}.gguf")
            except UnsupportedTarget as refusal:
                entry["gguf_refused"] = str(refusal)
            else:
                count = min(LENGTH, layout.context_length)
                entry["gguf"] = max(
                    float(np.abs(each - wanted[:count]).max())
                    for steps in ((), (3,))
                    for each in [llamacpp_logits.logits(here / f"{name}.gguf", ids[:count], steps)]
                )
            found[name] = entry
    MEASURED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _families() -> str:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = [("`model_type`", "beside a plain decoder", "ONNX", "GGUF", "MLX")]
    for name in FAMILIES:
        family = family_named(name)
        ours = [entry for entry in measured.values() if entry["family"] == name]
        features = {feature for entry in ours for feature in entry["features"]} - UNSAID
        gguf = [entry["gguf"] for entry in ours if "gguf" in entry]
        arch = f"`{family.gguf.arch}`, {_bound(gguf)}" if family.gguf and gguf else "no graph"
        onnx = _bound([entry["onnx"] for entry in ours])
        rows.append(
            (f"`{name}`", ", ".join(sorted(features)), onnx, arch, "yes" * (name in MLX_GRAPHS))
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _bound(errors: list[float]) -> str:
    """The largest of them, rounded up to one digit."""
    largest = max(errors)
    unit = 10.0 ** math.floor(math.log10(largest))
    return f"{math.ceil(largest / unit) * unit:.0e}".replace("e-0", "e-")


def _refused() -> str:
    return "\n".join(f"- `{name}`: {reason}." for name, reason in REFUSED.items())


if __name__ == "__main__":
    measure()
    write()
