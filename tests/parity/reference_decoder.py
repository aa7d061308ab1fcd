"""A decoder computed from its description and canonical tensors, in numpy float64: plain and slow.

It knows no family. What it answers is what a ``Decoder`` means, so exporters can be held against
it tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgellm.architectures.decoder import Decoder, Experts, Layer, Norm, Rope
from edgellm.architectures.rope import inverse_frequencies

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[np.floating]]


def logits(decoder: Decoder, tensors: Tensors, token_ids: Sequence[int]) -> Array:
    """Logits ``[tokens, vocab]`` after each of ``token_ids``.

    ``tensors`` by role, ``[out, in]``, q and k in half-rotation order, norm weights as a Hugging
    Face checkpoint holds them.
    """
    weights = {role: np.asarray(value, dtype=np.float64) for role, value in tensors.items()}
    x = weights["token_embd.weight"][list(token_ids)] * decoder.embedding_scale
    if decoder.embedding_norm:
        x = _norm(decoder.norm, weights, "token_embd_norm", x)
    if decoder.learned_positions is not None:
        x = x + weights["position_embd.weight"][decoder.skipped_positions :][: len(token_ids)]
    for index, layer in enumerate(decoder.layers):
        block = _under(weights, f"blk.{index}.")
        before = _norm(decoder.norm, block, "attn_norm", x) if decoder.pre_norms else x
        mixes = _scan if layer.scan else _convolution if layer.convolution else _attention
        after = x + decoder.residual_scale * mixes(decoder, layer, block, before)
        if not decoder.feed_forward:
            x = after
            continue
        if not decoder.shared_norm:
            before = x if decoder.parallel else after
            before = _norm(decoder.norm, block, "ffn_norm", before) if decoder.pre_norms else before
        x = after + decoder.residual_scale * _after_attention(decoder, layer, block, before)
    x = _norm(decoder.norm, weights, "output_norm", x)
    head = weights["token_embd.weight" if decoder.tied_head else "output.weight"]
    found = x @ head.T * decoder.logit_scale + weights.get("output.bias", 0.0)
    return _capped(found, decoder.logit_softcap)


def _attention(decoder: Decoder, layer: Layer, block: Tensors, x: Array) -> Array:
    tokens = len(x)
    made = _from_latents if decoder.latent is not None else _queries_keys_values
    q, k, v = made(decoder, layer, block, x)
    shared = decoder.heads // decoder.kv_heads
    k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * decoder.softmax_scale
    scores = _capped(scores, decoder.attention_softcap)
    age = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    if decoder.alibi:
        scores = scores - np.asarray(decoder.alibi)[:, None, None] * age
    seen = age >= 0
    if layer.window is not None:
        seen &= age < layer.window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)
    out = _product(block, "attn_output", mixed)
    return _norm(decoder.norm, block, "post_attention_norm", out) if decoder.post_norms else out


def _queries_keys_values(
    decoder: Decoder, layer: Layer, block: Tensors, x: Array
) -> tuple[Array, Array, Array]:
    """Each ``[tokens, heads, width]``, queries and keys turned."""
    tokens = len(x)
    q_size, kv_size = decoder.query_size, decoder.kv_size
    if decoder.fused_qkv:
        q, k, v = np.split(_product(block, "attn_qkv", x), [q_size, q_size + kv_size], axis=1)
    else:
        q, k, v = (_product(block, name, x) for name in ("attn_q", "attn_k", "attn_v"))
    if decoder.qkv_clip is not None:
        q, k, v = (np.clip(each, -decoder.qkv_clip, decoder.qkv_clip) for each in (q, k, v))
    if decoder.qk_norm_whole:
        q = _norm(decoder.norm, block, "attn_q_norm", q)
        k = _norm(decoder.norm, block, "attn_k_norm", k)
    q = q.reshape(tokens, decoder.heads, decoder.head_dim)
    k = k.reshape(tokens, decoder.kv_heads, decoder.head_dim)
    v = v.reshape(tokens, decoder.kv_heads, decoder.head_dim)
    if decoder.qk_norm and not decoder.qk_norm_whole:
        q = _norm(decoder.norm, block, "attn_q_norm", q)
        k = _norm(decoder.norm, block, "attn_k_norm", k)
    if layer.rope is not None:
        q, k = _rotate(layer.rope, q), _rotate(layer.rope, k)
    return q, k, v


def _from_latents(
    decoder: Decoder, layer: Layer, block: Tensors, x: Array
) -> tuple[Array, Array, Array]:
    """The same of latent vectors, with a key and a value for every head."""
    tokens, latent = len(x), decoder.latent
    assert latent is not None
    assert layer.rope is not None
    norm = Norm("rms", latent.epsilon)
    if latent.query_rank is None:
        q = _product(block, "attn_q", x)
    else:
        low = _norm(norm, block, "attn_q_a_norm", _product(block, "attn_q_a", x))
        q = _product(block, "attn_q_b", low)
    low, turned = np.split(_product(block, "attn_kv_a_mqa", x), [latent.rank], axis=1)
    made = _product(block, "attn_kv_b", _norm(norm, block, "attn_kv_a_norm", low))
    k, v = np.split(made.reshape(tokens, decoder.heads, -1), [latent.plain_dim], axis=2)
    plain, q = np.split(q.reshape(tokens, decoder.heads, -1), [latent.plain_dim], axis=2)
    q, turned = _rotate(layer.rope, q), _rotate(layer.rope, turned[:, None])
    turned = np.repeat(turned, decoder.heads, axis=1)
    return np.concatenate([plain, q], axis=2), np.concatenate([k, turned], axis=2), v


def _after_attention(decoder: Decoder, layer: Layer, block: Tensors, x: Array) -> Array:
    if layer.experts is None:
        return _feed_forward(decoder, block, x)
    return _mixture(decoder, layer.experts, block, x)


def _mixture(decoder: Decoder, experts: Experts, block: Tensors, x: Array) -> Array:
    router = experts.router
    logits = _product(block, "ffn_gate_inp", x)
    if router.scores == "sigmoid":
        scores = 1.0 / (1.0 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    ranked = scores + block["exp_probs_b.bias"] if router.bias else scores
    if router.groups > 1:
        by_group = ranked.reshape(len(x), router.groups, -1)
        tops = 1 if router.group_score == "best" else 2
        worth = np.sort(by_group, axis=2)[:, :, -tops:].sum(axis=2)
        last = np.sort(worth, axis=1)[:, -router.groups_used, None]
        ranked = np.where((worth >= last)[:, :, None], by_group, -np.inf).reshape(len(x), -1)
    out = np.zeros_like(x)
    for token, row in enumerate(ranked):
        chosen = np.argsort(-row, kind="stable")[: experts.used]
        weights = scores[token, chosen]
        if router.normalized:
            weights = weights / weights.sum()
        for expert, weight in zip(chosen, weights * router.factor, strict=True):
            out[token] += weight * _gated(decoder, block, f"exps.{expert}", x[token : token + 1])[0]
    if experts.shared_width:
        shared = _gated(decoder, block, "shexp", x)
        if experts.shared_gate:
            shared = shared / (1.0 + np.exp(-_product(block, "ffn_gate_inp_shexp", x)))
        out = out + shared
    return out


def _gated(decoder: Decoder, block: Tensors, part: str, x: Array) -> Array:
    gate = _ACTIVATIONS[decoder.activation](_product(block, f"ffn_gate_{part}", x))
    return _product(block, f"ffn_down_{part}", gate * _product(block, f"ffn_up_{part}", x))


def _convolution(decoder: Decoder, layer: Layer, block: Tensors, x: Array) -> Array:
    into, gate, values = np.split(_product(block, "shortconv.in_proj", x), 3, axis=1)
    mixed = _convolved(block, "shortconv.conv", into * values, layer.convolution.width)
    return _product(block, "shortconv.out_proj", gate * mixed)


def _convolved(block: Tensors, name: str, x: Array, width: int) -> Array:
    kernel, mixed = block[f"{name}.weight"][:, 0], np.zeros_like(x)
    for age in range(width):
        mixed[age:] += x[: len(x) - age] * kernel[:, -1 - age]
    return mixed + block.get(f"{name}.bias", 0.0)


def _scan(decoder: Decoder, layer: Layer, block: Tensors, x: Array) -> Array:
    settings, decay = layer.scan, -np.exp(block["ssm_a"])
    parts, inner, state = _product(block, "ssm_in", x), settings.inner, settings.state
    if settings.heads:
        gate, given, steps = np.split(parts, [inner, inner + settings.convolved], axis=1)
        given = _silu(_convolved(block, "ssm_conv1d", given, settings.width))
        shared = settings.groups * state
        given, into, out = np.split(given, [inner, inner + shared], axis=1)
        each = settings.heads // settings.groups
        into, out = (
            np.repeat(part.reshape(len(x), settings.groups, 1, state), each, axis=1)
            for part in (into, out)
        )
        values = given.reshape(len(x), settings.heads, -1, 1)
        decay = decay.reshape(1, -1, 1, 1)
    else:
        given, gate = np.split(parts, 2, axis=1)
        given = _silu(_convolved(block, "ssm_conv1d", given, settings.width))
        made, rank = _product(block, "ssm_x", given), settings.step_rank
        steps, into, out = np.split(made, [rank, rank + state], axis=1)
        steps = steps @ block["ssm_dt.weight"].T
        into, out = (part.reshape(len(x), 1, 1, state) for part in (into, out))
        values, decay = given.reshape(len(x), inner, 1, 1), decay.reshape(1, inner, 1, state)
    steps = np.logaddexp(0.0, steps + block["ssm_dt.bias"])[:, :, None, None]
    held, found = 0.0, []
    for token in range(len(x)):
        held = np.exp(decay[0] * steps[token]) * held + (steps * values * into)[token]
        found.append((held * out[token]).sum(axis=-1))
    y = np.stack(found) + block["ssm_d"][:, None] * values[..., 0]
    y = y.reshape(len(x), inner) * _silu(gate)
    if settings.heads:
        grouped = y.reshape(len(x), settings.groups, -1)
        spread = np.sqrt(np.mean(grouped**2, axis=-1, keepdims=True) + decoder.norm.epsilon)
        y = (grouped / spread).reshape(len(x), inner) * block["ssm_norm.weight"]
    return _product(block, "ssm_out", y)


def _feed_forward(decoder: Decoder, block: Tensors, x: Array) -> Array:
    activate = _ACTIVATIONS[decoder.activation]
    up = _product(block, "ffn_up", x)
    if decoder.fused_gate_up:
        gate, up = np.split(up, 2, axis=1)
        inner = activate(gate) * up
    else:
        inner = activate(_product(block, "ffn_gate", x)) * up if decoder.gated_mlp else activate(up)
    out = _product(block, "ffn_down", inner)
    return _norm(decoder.norm, block, "post_ffw_norm", out) if decoder.post_norms else out


def _product(block: Tensors, name: str, x: Array) -> Array:
    out = x @ block[f"{name}.weight"].T
    return out + block[f"{name}.bias"] if f"{name}.bias" in block else out


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def _norm(norm: Norm, block: Tensors, name: str, x: Array) -> Array:
    weight = block.get(f"{name}.weight", 1.0) + (1.0 if norm.offset else 0.0)
    if norm.kind == "rms":
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + norm.epsilon) * weight
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + norm.epsilon) * weight + block.get(f"{name}.bias", 0.0)


def _rotate(rope: Rope, x: Array) -> Array:
    """``x`` ``[tokens, heads, head_dim]`` turned by its position, pairs half a head apart."""
    frequencies, factor = inverse_frequencies(rope)
    angles = np.arange(len(x))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    first, second, rest = np.split(x, [rope.dimensions // 2, rope.dimensions], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


_ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "relu": _relu}


def _under(tensors: Tensors, prefix: str) -> dict[str, npt.NDArray[np.floating]]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
