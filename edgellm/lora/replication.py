"""Layers repeated before an adapter was trained (``layer_replication``): each copy its own.

PEFT repeats the modules with shared weights (``replicate_layers`` in its ``tuners_utils.py``) and
trains an adapter for every copy; its merge then adds all of them to the one shared weight. Here a
copy is a layer like any other, so that the merged model computes what the adapter was trained in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter
from edgellm.source.model import ModelSource

KEY = "layer_replication"
LAYERS_KEY = "num_hidden_layers"
"""PEFT repeats the layers of models that call their number so; GPT-2 does not."""


def replicated(source: ModelSource, adapters: Sequence[Adapter]) -> ModelSource:
    """``source`` with its layers repeated as the adapters' configs say; itself where none does.

    Raises ``AdapterError`` for adapters that disagree, and for ranges that the base does not have.
    """
    asked = [(adapter.name, adapter.config.get(KEY) or None) for adapter in adapters]
    if all(ranges is None for _, ranges in asked):
        return source
    first, ranges = asked[0]
    for name, other in asked[1:]:
        if other != ranges:
            raise AdapterError(
                f"{first} has {KEY} {ranges} and {name} {other}: they were trained on models of "
                "different layers and cannot be merged together; merge one of them"
            )
    decoder = source.decoder
    order = _order(first, ranges, len(decoder.layers))
    if LAYERS_KEY not in source.config or len(set(decoder.layers)) > 1:
        raise AdapterError(
            f"{first} repeats layers ({KEY} {ranges}), which PEFT does for models built like Llama "
            f"whose layers are all of one kind, and {source.name} is not one: name the base that "
            "it was trained on"
        )
    config = {**source.config, LAYERS_KEY: len(order)}
    if source.config.get("layer_types"):
        config["layer_types"] = [source.config["layer_types"][index] for index in order]
    repeated = replace(decoder, layers=tuple(decoder.layers[index] for index in order))
    tensors = {}
    for row in source.family.tensors(repeated):
        ref = source.tensors[_role_before(row.role, order)]
        tensors[row.role] = replace(ref, name=row.source, role=row.role)
    note = f"{first} repeats layers: {len(decoder.layers)} became {len(order)} ({KEY} {ranges})"
    return replace(
        source,
        config=config,
        decoder=repeated,
        tensors=tensors,
        notes=(*source.notes, note),
    )


def _order(name: str, ranges: Any, layers: int) -> list[int]:
    """For each layer of the result, the layer of the base that it copies."""
    order: list[int] = []
    for pair in ranges if isinstance(ranges, list) else [ranges]:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= layers:
            raise AdapterError(
                f"{name}: {KEY} holds {pair!r}, and ranges [first, end] of the base's {layers} "
                "layers are allowed: the adapter belongs to another base"
            )
        order += range(*pair)
    return order


def _role_before(role: str, order: Sequence[int]) -> str:
    if not role.startswith("blk."):
        return role
    _, index, rest = role.split(".", 2)
    return f"blk.{order[int(index)]}.{rest}"
