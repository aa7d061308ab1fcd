"""A ``Decoder`` in torch, layer by layer, differentiable; whoever holds the weights multiplies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from edgellm.architectures.decoder import Decoder, Layer, Rope
from edgellm.architectures.latent import Latent
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
    if decoder.embedding_norm:
        stream = norm(decoder, weights, "token_embd_norm", stream)
    if decoder.learned_positions is not None:
        places = torch.arange(ids.shape[-1], device=ids.device) + decoder.skipped_positions
        stream = stream + weights.rows("position_embd.weight", places)
    return stream


def layer(decoder: Decoder, index: int, weights: Weights, stream: Tensor) -> Tensor:
    """The residual stream ``[batch, tokens, hidden]`` after layer ``index``."""
    name = f"blk.{index}"

    def normed(part: str, x: Tensor) -> Tensor:
        return norm(decoder, weights, f"{name}.{part}", x) if decoder.pre_norms else x

    before = normed("attn_norm", stream)
    mixes = _attention if decoder.layers[index].convolution is None else _convolution
    branch = mixes(decoder, index, weights, before)
    if decoder.post_norms:
        branch = norm(decoder, weights, f"{name}.post_attention_norm", branch)
    after = stream + decoder.residual_scale * branch
    if not decoder.shared_norm:
        before = normed("ffn_norm", stream if decoder.parallel else after)
    branch = _feed_forward(decoder, index, weights, before)
    if decoder.post_norms:
        branch = norm(decoder, weights, f"{name}.post_ffw_norm", branch)
    return after + decoder.residual_scale * branch


def head_input(decoder: Decoder, weights: Weights, stream: Tensor) -> Tensor:
    """What the head multiplies, of the stream after the last layer, both ``[..., hidden]``."""
    return norm(decoder, weights, "output_norm", stream) * decoder.logit_scale


def norm(decoder: Decoder, weights: Weights, name: str, x: Tensor) -> Tensor:
    """``x`` ``[..., n]`` normed over its last dimension by the norm ``name``."""
    weight, epsilon = weights.vector(f"{name}.weight"), decoder.norm.epsilon
    if decoder.norm.kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.layer_norm(x, x.shape[-1:], weight, weights.vector(f"{name}.bias"), epsilon)


def _norm_by_head(decoder: Decoder, weights: Weights, name: str, x: Tensor) -> Tensor:
    """``x`` ``[..., heads, head_dim]`` normed over each head, with a row of weights for each."""
    weight = weights.vector(f"{name}.weight")
    assert weight is not None
    by_head = weight.reshape(-1, decoder.head_dim)
    if decoder.norm.kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], eps=decoder.norm.epsilon) * by_head
    return functional.layer_norm(x, x.shape[-1:], eps=decoder.norm.epsilon) * by_head


def _attention(decoder: Decoder, index: int, weights: Weights, x: Tensor) -> Tensor:
    name, settings = f"blk.{index}", decoder.layers[index]
    if decoder.latent is not None:
        q, k, v = _from_latents(decoder, decoder.latent, index, weights, x)
    else:
        q, k, v = _queries_keys_values(decoder, index, weights, x)
    shared = decoder.heads // decoder.kv_heads
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    mask = _mask(settings, x.shape[1], x.device)
    if decoder.alibi:
        mask = _with_alibi(decoder, mask, x)
    if decoder.attention_softcap is not None:
        mixed = _capped_attention(decoder, q, k, v, mask)
        return weights.product(f"{name}.attn_output", mixed.transpose(1, 2).flatten(2))
    mixed = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=decoder.softmax_scale
    )
    return weights.product(f"{name}.attn_output", mixed.transpose(1, 2).flatten(2))


def _queries_keys_values(
    decoder: Decoder, index: int, weights: Weights, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each ``[batch, heads, tokens, head_dim]``, queries and keys turned."""
    name, rope = f"blk.{index}", decoder.layers[index].rope
    if decoder.fused_qkv:
        sizes = [decoder.query_size, decoder.kv_size, decoder.kv_size]
        q, k, v = torch.split(weights.product(f"{name}.attn_qkv", x), sizes, dim=-1)
    else:
        q, k, v = (weights.product(f"{name}.attn_{part}", x) for part in "qkv")
    if decoder.qkv_clip is not None:
        q, k, v = (part.clamp(-decoder.qkv_clip, decoder.qkv_clip) for part in (q, k, v))
    if decoder.qk_norm_whole:
        q = norm(decoder, weights, f"{name}.attn_q_norm", q)
        k = norm(decoder, weights, f"{name}.attn_k_norm", k)
    q, k, v = (part.reshape(*part.shape[:2], -1, decoder.head_dim) for part in (q, k, v))
    if decoder.qk_norm_by_head:
        q = _norm_by_head(decoder, weights, f"{name}.attn_q_norm", q)
        k = _norm_by_head(decoder, weights, f"{name}.attn_k_norm", k)
    elif decoder.qk_norm and not decoder.qk_norm_whole:
        q = norm(decoder, weights, f"{name}.attn_q_norm", q)
        k = norm(decoder, weights, f"{name}.attn_k_norm", k)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if rope is not None:
        cos, sin = _turns(rope, x.shape[1], x.device)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    return q, k, v


def _from_latents(
    decoder: Decoder, latent: Latent, index: int, weights: Weights, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of latent vectors, expanded; values are of another width than keys."""
    name, rope = f"blk.{index}", decoder.layers[index].rope
    if latent.query_rank is None:
        q = weights.product(f"{name}.attn_q", x)
    else:
        low = weights.product(f"{name}.attn_q_a", x)
        low = _rms_norm(weights, f"{name}.attn_q_a_norm", low, latent.epsilon)
        q = weights.product(f"{name}.attn_q_b", low)
    made = weights.product(f"{name}.attn_kv_a_mqa", x)
    low, turned = torch.split(made, [latent.rank, latent.rope_dim], dim=-1)
    low = _rms_norm(weights, f"{name}.attn_kv_a_norm", low, latent.epsilon)
    q, kv = (
        part.reshape(*part.shape[:2], decoder.heads, -1).transpose(1, 2)
        for part in (q, weights.product(f"{name}.attn_kv_b", low))
    )
    k, v = torch.split(kv, [latent.plain_dim, latent.value_dim], dim=-1)
    plain, q = torch.split(q, [latent.plain_dim, latent.rope_dim], dim=-1)
    turned = turned[:, None]
    if rope is not None:
        cos, sin = _turns(rope, x.shape[1], x.device)
        q, turned = _turned(q, cos, sin), _turned(turned, cos, sin)
    turned = turned.expand(-1, decoder.heads, -1, -1)
    return torch.cat([plain, q], dim=-1), torch.cat([k, turned], dim=-1), v


def _rms_norm(weights: Weights, name: str, x: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weights.vector(f"{name}.weight"), epsilon)


def _convolution(decoder: Decoder, index: int, weights: Weights, x: Tensor) -> Tensor:
    name, hidden = f"blk.{index}.shortconv", decoder.hidden_size
    into, gate, values = weights.product(f"{name}.in_proj", x).chunk(3, dim=-1)
    kernel = weights.rows(f"{name}.conv.weight", torch.arange(hidden, device=x.device))
    kernel = kernel.reshape(hidden, 1, -1)
    given = functional.pad((into * values).transpose(1, 2), (kernel.shape[-1] - 1, 0))
    bias = weights.vector(f"{name}.conv.bias")
    mixed = functional.conv1d(given, kernel, bias, groups=hidden).transpose(1, 2)
    return weights.product(f"{name}.out_proj", gate * mixed)


def _capped_attention(
    decoder: Decoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention whose scores are soft-capped before the mask, ``[batch, heads, tokens, width]``."""
    cap = decoder.attention_softcap or 1.0
    scores = cap * torch.tanh(decoder.softmax_scale * (q @ k.transpose(-1, -2)) / cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def _feed_forward(decoder: Decoder, index: int, weights: Weights, x: Tensor) -> Tensor:
    name = f"blk.{index}"
    up = weights.product(f"{name}.ffn_up", x)
    if decoder.fused_gate_up:
        gate, up = up.chunk(2, dim=-1)
        active = _activated(decoder, gate) * up
    elif decoder.gated_mlp:
        active = _activated(decoder, weights.product(f"{name}.ffn_gate", x)) * up
    else:
        active = _activated(decoder, up)
    return weights.product(f"{name}.ffn_down", active)


def _activated(decoder: Decoder, x: Tensor) -> Tensor:
    if decoder.activation == "silu":
        return functional.silu(x)
    if decoder.activation == "relu":
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh" if decoder.activation == "gelu_tanh" else "none")


def _mask(settings: Layer, tokens: int, device: torch.device) -> Tensor | None:
    """Which tokens ``[tokens, tokens]`` see which; None where all before are seen."""
    if settings.window is None or settings.window >= tokens:
        return None
    age = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (age >= 0) & (age < settings.window)


def _with_alibi(decoder: Decoder, mask: Tensor | None, x: Tensor) -> Tensor:
    """What is added to scores ``[heads, tokens, tokens]``; minus infinity where one is unseen."""
    places = torch.arange(x.shape[1], device=x.device)
    age = places - places[:, None]
    slopes = torch.tensor(decoder.alibi, dtype=x.dtype, device=x.device)
    seen = age <= 0 if mask is None else mask
    return (slopes[:, None, None] * age).masked_fill(~seen, -torch.inf)


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
