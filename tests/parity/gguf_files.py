"""GGUF files made from a layout alone, without the machinery of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgellm.export.layout import Layout
from edgellm.export.packing import PACKERS
from edgellm.export.to_gguf import lay_out
from edgellm.quant.rtn import solve
from edgellm.recipe import Recipe
from edgellm.source import open_source
from edgellm.tensors import stacked_rows

ROWS = 1000
"""Rows at a time; not a multiple of anything, so that slabs begin inside of heads."""


def write_gguf(source: Path, path: Path, quant: str = "f32", **fields: Any) -> Layout:
    """The layout of ``source``, carried out into the file ``path``."""
    recipe = Recipe(source=str(source), format="gguf", quant=quant, **fields)
    layout = lay_out(open_source(str(source)), recipe)
    (name,) = layout.data_files
    with path.open("wb") as file:
        file.write(layout.files[name])
        for tensor in layout.tensors:
            (array,) = tensor.arrays
            file.seek(array.offset)
            for start in range(0, tensor.rows, ROWS):
                rows = stacked_rows(tensor.parts, start, min(start + ROWS, tensor.rows))
                file.write(PACKERS[tensor.packer].pack(solve(rows, tensor.grid))["data"].tobytes())
        file.truncate(layout.data_files[name])
    return layout
