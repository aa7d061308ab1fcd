"""Solvers and transforms by name; each is imported on use.

A solver picks codes on a grid: ``solve(rows, grid, statistics) -> QTensor``, with ``rows`` float32
``[rows, columns]``. Rows are solved apart: the result for a row does not depend on which others
come with it (but in ``quant/coupled.py``, which ``--tune`` calls in the stead of ``gptq``). A
transform edits coupled weights before a solver sees them, so that the network computes the same and
rounds better: ``search(weights, statistics, coupling, ...) -> Scaling`` (``quant/scaling.py``),
called by ``calibration/folding.py``. A split, after any transform, takes input channels out of the
rounding: ``outliers(statistics) -> channels``, called by ``calibration/splitting.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edgellm import registry

Needs = Literal["nothing", "importance", "hessian"]


@dataclass(frozen=True, slots=True)
class Solver:
    """One row: where it is, and what it must know of a layer's inputs (``Statistics``).

    ``on_torch``: it can solve on a device of torch's (``devices``), given as ``torch_device``.
    """

    attribute: str
    needs: Needs
    on_torch: bool = False


SOLVERS: dict[str, Solver] = {
    "rtn": Solver("edgellm.quant.rtn:solve", "nothing"),
    "imatrix": Solver("edgellm.quant.imatrix:solve", "importance"),
    "gptq": Solver("edgellm.quant.gptq:solve", "hessian", on_torch=True),
}

TRANSFORMS: dict[str, str] = {
    "awq": "edgellm.quant.awq:search",
    "smoothquant": "edgellm.quant.smoothquant:search",
}

SPLITS: dict[str, str] = {
    "llm_int8": "edgellm.quant.llm_int8:outliers",
}


def settings_of(name: str) -> dict[str, Any]:
    """What the solver, transform or split is set to in this version; empty where nothing is."""
    others = TRANSFORMS | SPLITS
    path = SOLVERS[name].attribute if name in SOLVERS else others[name]
    found: dict[str, Any] = registry.attribute(f"{path.partition(':')[0]}:SETTINGS")
    return dict(found)
