"""Importance that was gathered before, by llama.cpp or by a conversion, in place of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm.architectures.experts import expert_of, stack_of
from edgellm.digests import file_sha256
from edgellm.quant.imatrix_file import HEAD, Imatrix, read_imatrix, unmatched
from edgellm.quant.statistics import Statistics


@dataclass(frozen=True)
class GivenImportance:
    """Statistics by role of the weight, each a diagonal alone, and the file that they are from.

    ``missing``: roles of weights that the file says nothing about.
    """

    name: str
    sha256: str
    statistics: dict[str, Statistics]
    tokens: int
    chunks: int
    missing: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.missing:
            return ()
        return (
            f"{self.name} says nothing about {', '.join(self.missing)}: rounded without importance",
        )


def given_importance(path: Path, widths: Mapping[str, int], head: str) -> GivenImportance:
    """What the file says of the weights in ``widths`` (columns by role); ``head`` is the head's.

    llama.cpp calls the head ``output.weight`` whether it is tied or not. Raises ``SourceError`` for
    a file that is no importance matrix, ``TensorError`` for that of another model.
    """
    found = read_imatrix(path)
    names = {role: HEAD if role == head else stack_of(role) or role for role in widths}
    together: dict[str, int] = {}
    for role, columns in widths.items():
        together[names[role]] = together.get(names[role], 0) + columns
    missing = unmatched(found, together)
    return GivenImportance(
        name=path.name,
        sha256=file_sha256(path),
        statistics={
            role: _statistics(found, name, expert_of(role), widths[role])
            for role, name in names.items()
            if name in found.importance
        },
        tokens=max(found.tokens.values()) * (1 if found.chunk_tokens else 0),
        chunks=found.chunks,
        missing=tuple(role for role, name in names.items() if name in missing),
    )


def _statistics(found: Imatrix, name: str, expert: int | None, columns: int) -> Statistics:
    """Of the tensor ``name``, or of one expert in it."""
    values = found.importance[name]
    if expert is not None:
        values = values[expert * columns : (expert + 1) * columns]
    return Statistics(values, np.sqrt(values), found.tokens[name])
