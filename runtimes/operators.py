"""What a backend tells of its operators: one neutral form, whoever's clock it was."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OperatorEvent:
    """One operator, computed once.

    ``name``: the graph's own for it. ``kind``: the backend's word for what it does. ``layer``: of
    the decoder, from 0; None for what belongs to none. ``start_s``: since any one moment, the same
    for all events of a session.
    """

    name: str
    kind: str
    layer: int | None
    start_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What a backend was given at once: ``tokens``, when, and which operators that took.

    ``events`` follow one another and lie within the step; what they leave over is the backend's own
    time between them, and its clock's.
    """

    tokens: int
    start_s: float
    seconds: float
    events: tuple[OperatorEvent, ...]


_LAYER = re.compile(
    r"(?:^|[/._])(?:blk|blocks?|layers?|h)[._](\d+)"
    # genai's builder counts the norm after the last layer as one more.
    r"(?!/final_norm)(?=[/._]|$)"
)


def layer_of_node(name: str) -> int | None:
    """The layer that an ONNX node's name speaks of, in our graphs and others'; None where none.

    ``blk.3.attn_qkv``, ``/model/layers.3/mlp/MatMul``, ``/transformer/h.3/attn/Add``.
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None
