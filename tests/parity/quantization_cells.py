"""The matrix of solvers, grids and containers in docs/quantization.md, from the tables in code."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm.export.hf_layouts import LAYOUTS
from edgellm.export.to_onnx import GRID_NAMES
from edgellm.quant import SOLVERS
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.levels import VECTOR_CODEBOOKS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "quantization.md"
MARKED = re.compile(r"(<!-- cells -->\n).*?(<!-- /cells -->)", re.DOTALL)


def fill(text: str) -> str:
    """``text`` with the matrix made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{_matrix()}\n{found[2]}", text)


def write() -> None:
    """Make the matrix in the document anew."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def _matrix() -> str:
    head = ["grid", "bits of a code", "a scale for", *SOLVERS, "gguf", "onnx", "hf"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_row(grid))} |" for grid in GRIDS.values())])


def _row(grid: Grid) -> list[str]:
    shared = (
        "1 value" if grid.kind == "float" else f"{grid.group} values" if grid.group else "a row"
    )
    layouts = [name for name, storages in LAYOUTS.items() if grid.name in storages]
    plain = ["plain"] if grid.kind == "float" else []
    return [
        f"`{grid.name}`",
        f"{grid.bits:g}",
        "-" if grid.kind == "float" else shared,
        *(_solver(name, grid) for name in SOLVERS),
        "yes" if grid.ggml_type is not None else "no",
        "yes" if grid.name in GRID_NAMES else "no",
        ", ".join([*plain, *layouts]) or "no",
    ]


def _solver(name: str, grid: Grid) -> str:
    if grid.kind == "float":
        return "yes" if name == "rtn" else "nothing to solve"
    if grid.name in VECTOR_CODEBOOKS and name == "gptq":
        return "by imatrix"
    if grid.name in VECTOR_CODEBOOKS and name == "rtn" and _needs_importance(grid):
        return "no: garbage"
    return "yes"


def _needs_importance(grid: Grid) -> bool:
    import libgguf

    return bool(libgguf.quantize_requires_imatrix(grid.ggml_type))
