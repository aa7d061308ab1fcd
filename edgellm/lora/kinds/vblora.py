"""VB-LoRA: LoRA whose A and B are put together from one bank of short vectors.

Li et al. 2024, https://arxiv.org/abs/2405.15179. Each piece of A or B, as long as a vector of the
bank, is a mixture of the ``topk`` vectors with the largest logits, weighted by their softmax
(``Linear._get_lora_matrices``, ``tuners/vblora/layer.py``, peft 0.21.2). There is no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import LowRank, Target
from edgellm.lora.kinds.parts import exactly, linear, shaped
from edgellm.tensors import Array, TensorRef

PARTS = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> LowRank:
    """The change of ``target`` as a low rank; raises ``AdapterError`` for what does not fit.

    ``parts`` holds the shared ``vblora_vector_bank`` ``[vectors, length]`` beside the layer's own
    logits, A's ``[r, in / length, vectors]`` and B's ``[out / length, r, vectors]``.
    """
    out, into = linear(target, "VB-LoRA", conv1d=True)
    logits_a, logits_b, bank = exactly(target, parts, *PARTS)
    rank, topk = int(config.get("r", 4)), int(config.get("topk", 2))
    vectors, length = bank.shape if len(bank.shape) == 2 else (0, 1)
    if out % length or into % length or topk > vectors:
        raise AdapterError(
            f"{target.name} {list(target.shape)}: vblora_vector_bank has shape {list(bank.shape)}, "
            f"and at least topk = {topk} vectors are needed, of a length that both sides of the "
            "weight divide by: the adapter was trained on another model; name its own base"
        )
    shaped(target, "vblora_logits_A", logits_a, (rank, into // length, vectors))
    shaped(target, "vblora_logits_B", logits_b, (out // length, rank, vectors))

    def load_a(start: int, stop: int) -> Array:
        pieces = _mixed(logits_a.load(start, stop), bank.load(), topk)
        return pieces.reshape(stop - start, into)

    def load_b(start: int, stop: int) -> Array:
        first, last = start // length, -(-stop // length)
        pieces = _mixed(logits_b.load(first, last), bank.load(), topk)
        columns = pieces.reshape(last - first, rank, length).transpose(0, 2, 1)
        rows = columns.reshape(-1, rank)[start - first * length : stop - first * length]
        return np.ascontiguousarray(rows)

    return LowRank(
        TensorRef(logits_a.name, logits_a.role, (rank, into), "f32", 4 * rank * into, load_a),
        TensorRef(logits_b.name, logits_b.role, (out, rank), "f32", 4 * rank * out, load_b),
        1.0,
    )


def _mixed(logits: Array, bank: Array, topk: int) -> Array:
    """A mixture of ``bank`` for each ``len(bank)`` of ``logits``: ``[mixtures, length]``."""
    logits = logits.reshape(-1, len(bank))
    best = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
    top = np.take_along_axis(logits, best, axis=1)
    weights = np.exp(top - top[:, :1])
    weights /= weights.sum(axis=1, keepdims=True)
    result: Array = weights[:, :1] * bank[best[:, 0]]
    for place in range(1, topk):
        result += weights[:, place, None] * bank[best[:, place]]
    return result
