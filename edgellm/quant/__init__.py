"""Solvers by name; each picks codes on a grid for rows of weights, and is imported on use.

A solver is ``solve(rows, grid) -> QTensor`` with ``rows`` float32 ``[rows, columns]``.
"""

from __future__ import annotations

SOLVERS = {
    "rtn": "edgellm.quant.rtn:solve",
}
