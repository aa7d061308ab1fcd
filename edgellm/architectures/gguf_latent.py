"""What makes keys and values of latent vectors, in the two stacks of matrices that GGUF has.

``attn_k_b`` ``[heads, rank, plain_dim]`` takes queries to latents, so each head's keys lie in it
turned round; ``attn_v_b`` ``[heads, value_dim, rank]`` makes values of latents
(``DeepseekV2Model.modify_tensors`` in llama.cpp's converter). Files of before April 2025 have
``attn_kv_b`` as checkpoints do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from edgellm.architectures.decoder import Decoder
from edgellm.architectures.latent import Latent
from edgellm.errors import TensorError
from edgellm.tensors import Array, TensorRef, rows_in_order

WHOLE, KEYS, VALUES = ".attn_kv_b.", ".attn_k_b.", ".attn_v_b."
"""Middles of the roles: of the network's tensor, and of the two that stand for it."""


def whole_role(role: str) -> str:
    """The network's weight whose input that of ``role`` has: values are made of the latent too."""
    return role.replace(VALUES, WHOLE)


def source_role(role: str) -> str:
    """The network's weight that the tensor of ``role`` is or is made of."""
    return role.replace(KEYS, WHOLE).replace(VALUES, WHOLE)


def stored_shape(role: str, shape: tuple[int, ...], decoder: Decoder) -> tuple[int, ...]:
    """The shape that the file states; we have a stack's matrices one below the other."""
    if decoder.latent is None or not (KEYS in role or VALUES in role):
        return shape
    return (decoder.heads, shape[0] // decoder.heads, shape[1])


def apart(ref: TensorRef, decoder: Decoder) -> Iterator[TensorRef]:
    """Both stacks, their matrices one below the other, where ``ref`` is what they are made of."""
    latent = decoder.latent
    if latent is None or WHOLE not in ref.role:
        yield ref
        return
    yield _keys(ref, decoder.heads, latent)
    heads = np.arange(decoder.heads)[:, np.newaxis] * latent.head_rows
    order = (heads + latent.plain_dim + np.arange(latent.value_dim)).reshape(-1)
    yield replace(
        ref,
        role=ref.role.replace(WHOLE, VALUES),
        shape=(len(order), latent.rank),
        nbytes=ref.nbytes * latent.value_dim // latent.head_rows,
        load_rows=rows_in_order(ref.load_rows, order),
        column_loader=None,
    )


def _keys(ref: TensorRef, heads: int, latent: Latent) -> TensorRef:
    rank, width = latent.rank, latent.plain_dim

    def load_rows(start: int, stop: int) -> Array:
        first, last = start // rank, -(-stop // rank)
        rows = ref.load_rows(first * latent.head_rows, last * latent.head_rows)
        keys = rows.reshape(-1, latent.head_rows, rank)[:, :width].swapaxes(1, 2)
        return np.ascontiguousarray(
            keys.reshape(-1, width)[start - first * rank : stop - first * rank]
        )

    return replace(
        ref,
        role=ref.role.replace(WHOLE, KEYS),
        shape=(heads * rank, width),
        nbytes=ref.nbytes * width // latent.head_rows,
        load_rows=load_rows,
        column_loader=None,
    )


def joined(refs: Mapping[str, TensorRef], decoder: Decoder) -> dict[str, TensorRef]:
    """``refs`` by name with the network's tensor in place of each two stacks.

    Raises ``TensorError`` for stacks of other shapes than the network's.
    """
    latent, found = decoder.latent, dict(refs)
    if latent is None:
        return found
    for name in refs:
        other = name.replace(KEYS, VALUES)
        if KEYS in name and other in refs:
            keys, values = found.pop(name), found.pop(other)
            heads = decoder.heads
            _check(keys, (heads, latent.rank, latent.plain_dim))
            _check(values, (heads, latent.value_dim, latent.rank))
            whole = name.replace(KEYS, WHOLE)
            found[whole] = made_whole(keys, values, heads, latent).with_role(whole)
    return found


def made_whole(keys: TensorRef, values: TensorRef, heads: int, latent: Latent) -> TensorRef:
    """``attn_kv_b`` of the two stacks, which may be stacks or matrices one below the other."""
    each = latent.head_rows

    def load_rows(start: int, stop: int) -> Array:
        first, last = start // each, -(-stop // each)
        made = [
            ref.load_rows(first * ref.rows // heads, last * ref.rows // heads).reshape(
                last - first, -1, width
            )
            for ref, width in ((keys, latent.plain_dim), (values, latent.rank))
        ]
        rows = np.concatenate([made[0].swapaxes(1, 2), made[1]], axis=1).reshape(-1, latent.rank)
        return np.ascontiguousarray(rows[start - first * each : stop - first * each])

    return TensorRef(
        name=keys.name,
        role=keys.role,
        shape=(heads * each, latent.rank),
        dtype=keys.dtype,
        nbytes=keys.nbytes + values.nbytes,
        load_rows=load_rows,
    )


def _check(ref: TensorRef, shape: tuple[int, ...]) -> None:
    if ref.shape != shape:
        raise TensorError(
            f"tensor {ref.name} has shape {list(ref.shape)} and the file's keys give it "
            f"{list(shape)}: the file was put together of two models; fetch it again"
        )
