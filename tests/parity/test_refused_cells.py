"""A grid that a container does not hold is refused, and the next step that is named works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm.errors import UnknownGrid, UnsupportedTarget
from edgellm.export import CONTAINERS, container_named
from edgellm.export.layout import Layout
from edgellm.plan import resolve
from edgellm.quant.grid import GRIDS
from edgellm.recipe import make_recipe
from edgellm.source import ModelSource, open_source

TinyModel = Callable[[str], Path]

CELLS = [
    (container, grid)
    for container in CONTAINERS
    for grid in GRIDS
    if grid not in container_named(container).grids
]

NEEDS_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Grids that are garbage without, or parts of whose mixtures are."""


@pytest.fixture(scope="module")
def source(tiny_model: TinyModel) -> ModelSource:
    return open_source(str(tiny_model("llama-256")))


def laid_out(source: ModelSource, container: str, quant: str) -> Layout:
    asked = make_recipe({"source": str(source.path), "format": container, "quant": quant})
    return container_named(container).lay_out(source, resolve(asked)[0])


def test_there_are_cells() -> None:
    assert {container for container, _ in CELLS} == {"gguf", "onnx", "hf", "mlx"}
    assert ("onnx", "nf4-dq") in CELLS


@pytest.mark.parametrize(("container", "grid"), CELLS)
def test_the_next_step_of_a_refusal_works(container: str, grid: str, source: ModelSource) -> None:
    with pytest.raises((UnsupportedTarget, UnknownGrid)) as refused:
        laid_out(source, container, f"rtn:{grid}")
    said = str(refused.value)
    assert grid in said
    (instead,) = re.findall(r"(?:choose|one of) (?!--)([\w-]+)", said)
    assert instead != grid
    laid_out(source, container, f"rtn:{instead}")
    others = re.findall(r"--format (\w+)", said)
    if GRIDS[grid].ggml_type is None or container != "gguf":
        assert others
    for other in others:
        assert other != container
        # GGUF's k-quants have other names where they are for a whole model.
        name = grid if grid in container_named(other).grids else f"{grid}_m"
        laid_out(source, other, f"{'imatrix' if grid in NEEDS_IMPORTANCE else 'rtn'}:{name}")
