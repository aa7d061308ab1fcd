"""The blocks of a calibrated conversion: which tensors wait for the statistics of which layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.architectures.gguf_latent import KEYS, whole_role
from edgellm.export.layout import OutputTensor
from edgellm.quant.grid import Grid
from edgellm.quant.statistics import Statistics

LAYER_ROLE = re.compile(r"blk\.(\d+)\.")

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
OF_HEAD = ("output_norm.", "output.")
"""How the roles of what belongs to the head's block begin: its norm, and what is cut out of it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors, by their place in the layout, that are rounded with the statistics of ``unit``.

    ``unit`` counts the layers, and the head is one more. It is None for what has no statistics: the
    embedding, tables, adapters beside the model.
    """

    unit: int | None
    name: str
    tensors: tuple[int, ...]


def blocks_of(tensors: Sequence[OutputTensor], layers: int, *, tied: bool) -> list[Block]:
    """``tensors`` by block: what has no statistics first, then the layers, then the head.

    A tied table that is stored once is the head's; norms belong to the block that they come before,
    whose transforms may change them. Blocks without tensors are left out.
    """
    places: dict[int | None, list[int]] = {}
    heads = heads_among(tensors, tied=tied)
    for place, tensor in enumerate(tensors):
        role = tensor.parts[0].role
        layer = LAYER_ROLE.match(role)
        if place in heads or role.startswith(OF_HEAD):
            unit: int | None = layers
        else:
            unit = int(layer[1]) if layer else None
        places.setdefault(unit, []).append(place)
    names = {None: "what has no statistics", layers: "head"}
    order = [None, *range(layers + 1)]
    return [
        Block(unit, names.get(unit, f"layer {unit}"), tuple(places[unit]))
        for unit in order
        if unit in places
    ]


def heads_among(tensors: Sequence[OutputTensor], *, tied: bool) -> set[int]:
    """The places of the tensors that logits are computed with.

    Of a tied table that is stored twice, it is the one called ``output.weight``.
    """
    named = {
        place for place, tensor in enumerate(tensors) if HEAD in (tensor.role, tensor.parts[0].role)
    }
    if named or not tied:
        return named
    return {place for place, tensor in enumerate(tensors) if tensor.parts[0].role == EMBEDDING}


def statistics_of(
    tensor: OutputTensor, found: Mapping[str, Statistics], expert: int = 0
) -> Statistics | None:
    """What is known of the input that all parts of ``tensor`` share, or ``expert`` of a stack has.

    None for floats, which nothing is chosen for, and for what is no product's weight.
    """
    if tensor.grid.kind == "float":
        return None
    if tensor.experts > 1:
        return found.get(tensor.parts[expert * len(tensor.parts) // tensor.experts].role)
    of_parts = [found.get(whole_role(part.role)) for part in tensor.parts]
    known = {id(each): each for each in of_parts}
    if len(known) != 1:
        raise AssertionError(f"the parts of {tensor.name} have different inputs")
    return next(iter(known.values()))


def grids_by_role(tensors: Sequence[OutputTensor], *, tied: bool) -> dict[str, Grid]:
    """The grid of every part of ``tensors``; of a tied table that is stored twice, the head's.

    Of a weight that is stored in two stacks, that of the one whose input it shares; the other's
    inputs are the queries of each head, of which nothing is known.
    """
    heads = heads_among(tensors, tied=tied)
    order = sorted(range(len(tensors)), key=lambda place: place in heads)
    return {
        whole_role(part.role): tensors[place].grid
        for place in order
        for part in tensors[place].parts
        if KEYS not in part.role
    }
