"""Folders that onnxruntime-genai's model builder makes of the measured model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import fresh, run
from benchmarks.places import WORK, peers_python

DEFAULT: tuple[str, ...] = ()
"""What `-p int4 -e cpu` alone gives: symmetric blocks of 32, head and embedding at 4 bits too."""

LAST_LOGITS = ("block_size=32", "is_symmetric=true", "prune_lm_head=true")
"""The same with logits for the last position only, as ours gives them."""


def command(model: Path, out: str, options: tuple[str, ...] = DEFAULT) -> list[str]:
    """The builder's command line, to be run in the work folder."""
    words = [peers_python(), "-m", "onnxruntime_genai.models.builder", "-i", model.name, "-o", out]
    words += ["-p", "int4", "-e", "cpu", "-c", "genai-cache"]
    return words + (["--extra_options", *options] if options else [])


def build(model: Path, out: str, options: tuple[str, ...] = DEFAULT) -> list[str]:
    """Make the folder ``out`` unless it is there; the command that does it."""
    words = command(model, out, options)
    if not (WORK / out / "genai_config.json").exists():
        fresh(out)
        run(words)
    return words
