"""Rows of weights as llama.cpp's graphs read them, and back as a checkpoint stores them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgellm.architectures.decoder import Decoder
from edgellm.architectures.family import GgufLayout, TensorRow
from edgellm.architectures.row_order import Order
from edgellm.tensors import TensorRef, derived, reordered

PAIRED_ROLES = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")
"""Ends of the roles whose rows ``GgufLayout.interleaved_rope`` is about."""


def name_in_file(role: str, decoder: Decoder, layout: GgufLayout) -> str:
    """What a GGUF file calls the tensor of ``role``."""
    names = layout.names(decoder)
    stem, _, end = role.rpartition(".")
    place = ".".join(stem.split(".")[:2]) + "." if stem.startswith("blk.") else ""
    part = stem.removeprefix(place)
    return f"{place}{names.get(part, part)}.{end}"


def as_llamacpp_stores(
    ref: TensorRef, row: TensorRow, decoder: Decoder, layout: GgufLayout
) -> TensorRef:
    """``ref`` with the rows of q and k in pairs, or a norm with its offset added.

    A convolution goes without its dimension of one.
    """
    if layout.interleaved_rope and row.role.endswith(PAIRED_ROLES):
        return reordered(ref, pairs_order(_heads(row, decoder), decoder.head_dim))
    if layout.norm_plus_one and row.kind == "norm":
        return derived(ref, lambda values: values + np.float32(1))
    if row.kind == "convolution":
        return replace(ref, shape=(ref.rows, ref.columns))
    return ref


def as_checkpoint_stores(
    ref: TensorRef, row: TensorRow, decoder: Decoder, layout: GgufLayout
) -> TensorRef:
    """What ``as_llamacpp_stores`` did, undone.

    A convolution has its dimension of one by then (``as_described``).
    """
    if layout.interleaved_rope and row.role.endswith(PAIRED_ROLES):
        return reordered(ref, halves_order(_heads(row, decoder), decoder.head_dim))
    if layout.norm_plus_one and row.kind == "norm":
        return derived(ref, lambda values: values - np.float32(1))
    return ref


def as_described(ref: TensorRef, row: TensorRow) -> TensorRef:
    """A stored tensor with the dimension of one that ``row`` has, and ggml has no use for."""
    without = (row.shape[0], row.shape[-1])
    squeezed = row.kind == "convolution" and ref.shape == without
    return replace(ref, shape=row.shape) if squeezed else ref


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
