"""Importance that was gathered before, by llama.cpp or by a conversion, in place of a pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgellm.architectures.experts import expert_of, stack_of
from edgellm.architectures.gguf_latent import KEYS, VALUES, whole_role
from edgellm.digests import file_sha256
from edgellm.errors import TensorError
from edgellm.quant.imatrix_file import HEAD, Imatrix, read_imatrix, unmatched
from edgellm.quant.statistics import Statistics
from edgellm.source.matching import listed


@dataclass(frozen=True)
class GivenImportance:
    """Statistics by role of the weight, each a diagonal alone, and the file that they are from.

    ``missing``: roles of weights to be rounded that the file says nothing about. ``unused``: those
    that it says something about and that are rounded without (``attn_k_b``, whose inputs differ by
    head).
    """

    name: str
    sha256: str
    statistics: dict[str, Statistics]
    tokens: int
    chunks: int
    missing: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.missing:
            missing = ", ".join(self.missing)
            notes.append(f"{self.name} says nothing about {missing}: rounded without importance")
        if self.unused:
            notes.append(
                f"{self.name} has importance of {listed(list(self.unused))}, whose inputs differ "
                "by head: rounded without"
            )
        return tuple(notes)


def given_importance(
    path: Path, widths: Mapping[str, int], head: str, floats: Collection[str] = ()
) -> GivenImportance:
    """What the file says of the weights in ``widths`` (columns by role); ``head`` is the head's.

    ``floats``: roles of those that are not rounded, of which nothing need be known. llama.cpp calls
    the head ``output.weight`` whether it is tied or not. Raises ``SourceError`` for a file that is
    no importance matrix, ``TensorError`` for that of another model.
    """
    found = _with_latents(read_imatrix(path), widths)
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
        missing=tuple(
            role for role, name in names.items() if name in missing and role not in floats
        ),
        unused=tuple(name for name in found.importance if KEYS in name),
    )


def _with_latents(found: Imatrix, widths: Mapping[str, int]) -> Imatrix:
    """``found`` with that of ``attn_kv_b`` where it has that of ``attn_v_b``, by head, alone.

    Values of all heads are made of one latent, so what they say of its channels is averaged.
    """
    importance, tokens = dict(found.importance), dict(found.tokens)
    for name, values in found.importance.items():
        whole = whole_role(name)
        if VALUES not in name or whole in importance or whole not in widths:
            continue
        if len(values) % widths[whole]:
            raise TensorError(
                f"the importance matrix has {len(values)} channels for {name}, of latents of "
                f"{widths[whole]}: it was made for another model"
            )
        importance[whole] = values.reshape(-1, widths[whole]).mean(axis=0)
        tokens[whole] = found.tokens[name]
    return replace(found, importance=importance, tokens=tokens)


def _statistics(found: Imatrix, name: str, expert: int | None, columns: int) -> Statistics:
    """Of the tensor ``name``, or of one expert in it."""
    values = found.importance[name]
    if expert is not None:
        values = values[expert * columns : (expert + 1) * columns]
    return Statistics(values, np.sqrt(values), found.tokens[name])
