"""Whether a stopped conversion can go on: the digest of all that its bytes follow from."""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from pathlib import Path

import msgspec

from edgellm.conversion_manifest import planned_versions
from edgellm.export.writer import begun_before
from edgellm.plan import Plan


def resume_key(plan: Plan) -> str:
    """Digest of all that the bytes of a calibrated conversion follow from; empty without.

    A run with the same key may go on from what another one left.
    """
    calibration = plan.calibration
    if calibration is None:
        return ""
    layout, source = plan.layout, plan.source
    parts = {
        "recipe": plan.recipe.choices(),
        "source": source.digest(),
        "adapters": [adapter.digest() for adapter in source.merge.adapters] if source.merge else [],
        "calibrated_with": calibration.sha256,
        "files": {
            name: hashlib.sha256(content).hexdigest() for name, content in layout.files.items()
        },
        "tensors": [
            (
                tensor.name,
                tensor.grid.name,
                tensor.packer,
                [astuple(each) for each in tensor.arrays],
            )
            for tensor in layout.tensors
        ],
        "versions": planned_versions(plan),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def begun_blocks(plan: Plan, out: Path) -> list[str]:
    """The blocks that a stopped run of the same plan to ``out`` has done."""
    key = resume_key(plan)
    entries = begun_before(out, key) if key else []
    return [entry["block"] for entry in entries if "block" in entry]
