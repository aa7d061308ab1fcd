"""Rows of weights as llama.cpp's graphs read them, and back as a checkpoint stores them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgellm.architectures.decoder import Decoder
from edgellm.architectures.experts import SHARED_GATE
from edgellm.architectures.family import GgufLayout, TensorRow
from edgellm.architectures.row_order import Order, as_checkpoint_has, as_network_takes
from edgellm.tensors import TensorRef, derived, reordered, reshaped

PAIRED_ROLES = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")
"""Ends of the roles whose rows ``GgufLayout.interleaved_rope`` is about."""


def name_in_file(role: str, decoder: Decoder, layout: GgufLayout) -> str:
    """What a GGUF file calls the tensor of ``role``."""
    names = layout.names(decoder)
    if not names:
        return role
    stem, _, end = role.rpartition(".")
    place = ".".join(stem.split(".")[:2]) + "." if stem.startswith("blk.") else ""
    part = stem.removeprefix(place)
    return f"{place}{names.get(part, part)}.{end}"


def as_llamacpp_stores(
    ref: TensorRef, row: TensorRow, decoder: Decoder, layout: GgufLayout
) -> TensorRef:
    """``ref`` with the rows of q and k in pairs, or a norm with its offset added.

    The gate of a shared expert is a vector there. A convolution goes without its dimension of one,
    decays are what their logarithms mean.
    """
    if row.role.endswith(SHARED_GATE):
        return replace(ref, shape=(ref.columns,))
    if layout.as_checkpoint:
        return as_checkpoint_has(ref, row)
    if layout.interleaved_rope and row.role.endswith(PAIRED_ROLES):
        return reordered(ref, pairs_order(_heads(row, decoder), decoder.head_dim))
    if layout.norm_plus_one and row.kind == "norm":
        return derived(ref, lambda values: values + np.float32(1))
    if row.kind == "decay":
        ref = derived(ref, lambda values: -np.exp(values))
    shape = _stored_shape(row, decoder, layout)
    return ref if shape == row.shape else reshaped(ref, shape)


def _stored_shape(row: TensorRow, decoder: Decoder, layout: GgufLayout) -> tuple[int, ...]:
    if row.kind == "convolution":
        return (row.shape[0], row.shape[-1])
    return layout.shapes(decoder).get(row.role.split(".", 2)[-1], row.shape)


def as_checkpoint_stores(
    ref: TensorRef, row: TensorRow, decoder: Decoder, layout: GgufLayout
) -> TensorRef:
    """What ``as_llamacpp_stores`` did, undone.

    Shapes are the network's by then (``as_described``).
    """
    if layout.as_checkpoint:
        return as_network_takes(ref, row)
    if layout.interleaved_rope and row.role.endswith(PAIRED_ROLES):
        return reordered(ref, halves_order(_heads(row, decoder), decoder.head_dim))
    if layout.norm_plus_one and row.kind == "norm":
        return derived(ref, lambda values: values - np.float32(1))
    if row.kind == "decay":
        return derived(ref, lambda values: np.log(-values))
    return ref


def as_described(ref: TensorRef, row: TensorRow, decoder: Decoder, layout: GgufLayout) -> TensorRef:
    """A stored tensor in the shape that the network has for it, where llama.cpp has another."""
    stored = _stored_shape(row, decoder, layout)
    other = stored != row.shape and ref.shape == stored
    return reshaped(ref, row.shape) if other else ref


def pairs_order(heads: int, head_dim: int) -> Order:
    """For each row of a head in pairs (x0, y0, ..), its place in halves (x0, x1, .., y0, ..).

    ``LlamaModel.permute`` in llama.cpp's converter.
    """
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def halves_order(heads: int, head_dim: int) -> Order:
    """The inverse: for each row of a head in halves, its place in pairs."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _heads(row: TensorRow, decoder: Decoder) -> int:
    return decoder.heads if ".attn_q." in row.role else decoder.kv_heads
