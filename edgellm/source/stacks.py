"""Stacks of experts taken apart: each expert's weight a tensor of its own, wherever it is stored.

transformers 5 computes with gate and up of all experts of a layer in one tensor and saves either
spelling, Granite's checkpoints have never had another, and GGUF has a stack for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from edgellm.architectures.experts import SHARED_GATE, expert_of, stack_of
from edgellm.architectures.family import TensorRow
from edgellm.errors import TensorError
from edgellm.tensors import TensorRef, rows_of, stacked

Matrix = Callable[[TensorRef], TensorRef]
"""A stored tensor of any shape as ``[rows, in]``, all of its dimensions but the last as rows."""


def unstacked(
    stored: Mapping[str, TensorRef], rows: Iterable[TensorRow], matrix: Matrix, where: str
) -> dict[str, TensorRef]:
    """A checkpoint's tensors ``stored``, with what lies elsewhere under the name of its row.

    Nothing is loaded. Raises ``TensorError`` for a stack that is not of the config's shape.
    """
    found: dict[str, TensorRef] = dict(stored)
    used: set[str] = set()
    for row in rows:
        if row.source in stored:
            continue
        if row.pieces and all(name in stored for name in row.pieces):
            used.update(row.pieces)
            found[row.source] = stacked([stored[name] for name in row.pieces], row.source)
            continue
        part = next((each for each in row.elsewhere if each.name in stored), None)
        if part is None:
            continue
        whole = stored[part.name]
        if whole.shape != part.shape:
            raise TensorError(_wrong_shape(where, whole, part.shape))
        used.add(part.name)
        expert = expert_of(row.role)
        name = whole.name if expert is None else f"{whole.name}, expert {expert}"
        found[row.source] = rows_of(matrix(whole), part.first, row.shape[0], name)
    return {name: ref for name, ref in found.items() if name not in used}


def unstacked_gguf(
    stored: Mapping[str, TensorRef], rows: Iterable[TensorRow], matrix: Matrix, where: str
) -> dict[str, TensorRef]:
    """The same of a GGUF file's tensors by role, where each stack holds one part of all experts."""
    rows = tuple(rows)
    counts: dict[str, int] = {}
    for row in rows:
        if stack := stack_of(row.role):
            counts[stack] = counts.get(stack, 0) + 1
    found = {role: ref for role, ref in stored.items() if role not in counts}
    for row in rows:
        stack, expert = stack_of(row.role), expert_of(row.role)
        whole = stored.get(stack)
        if row.role.endswith(SHARED_GATE) and row.role in found:
            found[row.role] = replace(found[row.role], shape=row.shape)  # stored as a vector
        if whole is None or expert is None:
            continue
        shape = (counts[stack], *row.shape)
        if whole.shape != shape:
            raise TensorError(_wrong_shape(where, whole, shape))
        name = f"{whole.name}, expert {expert}"
        found[row.role] = rows_of(matrix(whole), expert * row.shape[0], row.shape[0], name)
    return found


def _wrong_shape(where: str, whole: TensorRef, wanted: tuple[int, ...]) -> str:
    said = f"{where}: tensor {whole.name} has shape {list(whole.shape)} and the config gives it "
    experts = ""
    if len(wanted) == 3 and whole.shape[:1] != wanted[:1]:
        experts = f": the config says {wanted[0]} experts and the weights are of {whole.shape[0]}"
    return (
        f"{said}{list(wanted)}{experts}; the config belongs to another model, or was edited: fetch "
        "the model again"
    )
