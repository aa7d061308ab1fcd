"""A ``Decoder`` in torch, layer by layer, differentiable; whoever holds the weights multiplies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from edgellm.architectures.decoder import Decoder, Layer, Rope
from edgellm.architectures.rope import inverse_frequencies


class Weights(Protocol):
    """The weights of a network by role, as the network uses them (norms with their offset)."""

    def product(self, role: str, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` times the weight ``[out, in]`` of ``role``, plus its bias if any."""

    def vector(self, role: str) -> Tensor | None:
        """A norm's weight or bias ``[n]``; None where the network has none."""

    def rows(self, role: str, ids: Tensor) -> Tensor:
        """The rows ``ids`` ``[...]`` of a table, ``[..., columns]``."""


def embedded(decoder: Decoder, weights: Weights, ids: Tensor) -> Tensor:
    """The residual stream ``[batch, tokens, hidden]`` before the first layer, for token ids."""
    stream = weights.rows("token_embd.weight", ids)
    if decoder.embedding_scale != 1.0:
        stream = stream * decoder.embedding_scale
    if decoder.learned_positions is not None:
        places = torch.arange(ids.shape[-1], device=ids.device)
        stream = stream + weights.rows("position_embd.weight", places)
    return stream


def layer(decoder: Decoder, index: int, weights: Weights, stream: Tensor) -> Tensor:
    """The residual stream ``[batch, tokens, hidden]`` after layer ``index``."""
    name = f"blk.{index}"
    branch = _attention(
        decoder, index, weights, norm(decoder, weights, f"{name}.attn_norm", stream)
    )
    if decoder.post_norms:
        branch = norm(decoder, weights, f"{name}.post_attention_norm", branch)
    stream = stream + branch
    branch = _feed_forward(
        decoder, index, weights, norm(decoder, weights, f"{name}.ffn_norm", stream)
    )
    if decoder.post_norms:
        branch = norm(decoder, weights, f"{name}.post_ffw_norm", branch)
    return stream + branch


def norm(decoder: Decoder, weights: Weights, name: str, x: Tensor) -> Tensor:
    """``x`` ``[..., n]`` normed over its last dimension by the norm ``name``."""
    weight, epsilon = weights.vector(f"{name}.weight"), decoder.norm.epsilon
    if decoder.norm.kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.layer_norm(x, x.shape[-1:], weight, weights.vector(f"{name}.bias"), epsilon)


def _attention(decoder: Decoder, index: int, weights: Weights, x: Tensor) -> Tensor:
    name, settings = f"blk.{index}", decoder.layers[index]
    if decoder.fused_qkv:
        sizes = [decoder.query_size, decoder.kv_size, decoder.kv_size]
        parts = torch.split(weights.product(f"{name}.attn_qkv", x), sizes, dim=-1)
    else:
        parts = tuple(weights.product(f"{name}.attn_{part}", x) for part in "qkv")
    q, k, v = (part.reshape(*part.shape[:2], -1, decoder.head_dim) for part in parts)
    if decoder.qk_norm:
        q = norm(decoder, weights, f"{name}.attn_q_norm", q)
        k = norm(decoder, weights, f"{name}.attn_k_norm", k)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if settings.rope is not None:
        cos, sin = _turns(settings.rope, x.shape[1], x.device)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    shared = decoder.heads // decoder.kv_heads
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    mask = _mask(settings, x.shape[1], x.device)
    mixed = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=decoder.softmax_scale
    )
    return weights.product(f"{name}.attn_output", mixed.transpose(1, 2).flatten(2))


def _feed_forward(decoder: Decoder, index: int, weights: Weights, x: Tensor) -> Tensor:
    name = f"blk.{index}"
    up = weights.product(f"{name}.ffn_up", x)
    if decoder.gated_mlp:
        active = _activated(decoder, weights.product(f"{name}.ffn_gate", x)) * up
    else:
        active = _activated(decoder, up)
    return weights.product(f"{name}.ffn_down", active)


def _activated(decoder: Decoder, x: Tensor) -> Tensor:
    if decoder.activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if decoder.activation == "gelu_tanh" else "none")


def _mask(settings: Layer, tokens: int, device: torch.device) -> Tensor | None:
    """Which tokens ``[tokens, tokens]`` see which; None where all before are seen."""
    if settings.window is None or settings.window >= tokens:
        return None
    age = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (age >= 0) & (age < settings.window)


def _turns(rope: Rope, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, dimensions / 2]``; angles are taken in float64."""
    frequencies, factor = inverse_frequencies(rope)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.from_numpy(frequencies)
    cos, sin = torch.cos(angles) * factor, torch.sin(angles) * factor
    return cos.float().to(device), sin.float().to(device)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[batch, heads, tokens, head_dim]`` by its position, pairs half a rope apart."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
