"""The tables of docs/quantization.md, made from those in the code: solvers, grids, containers."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm.calibration.splitting import OTHER_WAYS
from edgellm.calibration.transforms import check_useful
from edgellm.errors import UsageError
from edgellm.export import CONTAINERS, container_named
from edgellm.export.hf_layouts import LAYOUTS
from edgellm.export.to_onnx import GRID_NAMES
from edgellm.quant import SOLVERS, SPLITS, TRANSFORMS
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.levels import VECTOR_CODEBOOKS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "quantization.md"
MARKED = re.compile(r"(<!-- (cells|transforms) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(text: str) -> str:
    """``text`` with the tables made anew."""
    tables = {"cells": _matrix, "transforms": _transforms}
    return MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", text)


def write() -> None:
    """Make the tables in the document anew."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def _matrix() -> str:
    head = ["grid", "bits of a code", "a scale for", *SOLVERS, "gguf", "onnx", "hf", "mlx"]
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
        "yes" if grid.name in container_named("mlx").grids else "no",
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


def _transforms() -> str:
    head = ["before the solver", *CONTAINERS]
    rows = [
        [f"`{name}`", *(_held(name, container) for container in CONTAINERS)]
        for name in (*TRANSFORMS, *SPLITS)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _held(name: str, container: str) -> str:
    """On which grids ``name`` has something to do, where the container can hold what it does."""
    grids = [GRIDS[grid] for grid in container_named(container).grids if grid in GRIDS]
    useful = [grid.name for grid in grids if not _refused(name, grid)]
    if not useful:
        return "no"
    if name in SPLITS and container in OTHER_WAYS:
        return "no: bitsandbytes does it as it runs"
    rounding = [grid for grid in grids if grid.kind != "float"]
    if len(useful) == len(rounding):
        return "every grid but floats"
    return ", ".join(f"`{grid}`" for grid in useful)


def _refused(name: str, grid: Grid) -> bool:
    try:
        check_useful(name, [grid])
    except UsageError:
        return True
    return False
