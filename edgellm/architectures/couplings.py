"""Which weights share an input, and which tensors before them can be scaled without a trace.

Where a product's input is itself made by weights without a nonlinearity between, channel ``c`` of
the input may be divided by any ``s_c`` there and column ``c`` of the product multiplied by it: the
network computes the same, and rounds differently (AWQ, arXiv 2306.00978, section 3.2; SmoothQuant,
arXiv 2211.10438, section 4). Every family is described by its ``Decoder`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.architectures.decoder import Decoder, StateSpace
from edgellm.tensors import Array


@dataclass(frozen=True, slots=True)
class Absorber:
    """A tensor before a coupling that divides by its factors: rows of a weight, or a vector.

    Factors belong to the rows (or values) from ``first`` on. ``offset`` is what the network adds to
    the stored values (norms stored less one).
    """

    role: str
    first: int = 0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Coupling:
    """Weights that share an input, and what absorbs the inverse of their factors.

    ``name`` is the tensor that makes the input (``attn_norm``, ``attn_v``, ``shortconv.in_proj``,
    ``ssm_norm``, ``ffn_norm``, ``ffn_up``, ``output_norm``). ``consumers`` are roles of the weights
    ``[out, columns]`` that share it. ``layer`` counts the layers, the head is one more. The input's
    columns are ``[kv_heads, group, width]``: the heads of a group repeat one head of values, so
    that they share its factors. Elsewhere there is one head in one group.
    """

    layer: int
    name: str
    consumers: tuple[str, ...]
    absorbers: tuple[Absorber, ...]
    width: int
    kv_heads: int = 1
    group: int = 1

    @property
    def channels(self) -> int:
        """How many factors there are to choose."""
        return self.kv_heads * self.width

    @property
    def columns(self) -> int:
        """Values of the shared input."""
        return self.channels * self.group

    @property
    def key(self) -> str:
        """A name that no other coupling of the model has."""
        return f"{self.layer}.{self.name}"

    def spread(self, factors: Array) -> Array:
        """Factors ``[channels]`` as each column of the consumers takes them, ``[columns]``."""
        heads = factors.reshape(self.kv_heads, 1, self.width)
        return np.repeat(heads, self.group, axis=1).reshape(-1)

    def by_channel(self, values: Array) -> Array:
        """Values ``[columns]`` of the consumers' columns as ``[group, channels]``."""
        heads = values.reshape(self.kv_heads, self.group, self.width)
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(self.group, -1)


def couplings(decoder: Decoder) -> tuple[Coupling, ...]:
    """Every coupling of the network, in the order of the computation, the head's last.

    A layer has up to four: attention's norm to q, k and v; the rows of v to attention's output
    (softmax weighs values and does not change them); the feed-forward's norm to gate and up; the
    rows of up, which a gate only multiplies, to down. A short convolution has the norm before it,
    and the rows of x, which are multiplied and summed channel by channel, to its output; a
    state-space layer the norm before it, and Mamba 2 the one before its output.
    ``left_out`` says which are not there.
    """
    found: list[Coupling] = []
    for layer in range(len(decoder.layers)):
        before = _norms(decoder, layer)
        found += [each for each in before if each.name == "attn_norm"]
        scan = decoder.layers[layer].scan
        if decoder.layers[layer].convolution is not None:
            found.append(_convolved(decoder, layer))
        elif scan is not None:
            found += [_scanned(decoder, layer, scan)] if scan.heads else []
        elif decoder.qkv_clip is None:
            found.append(_values(decoder, layer))
        found += [each for each in before if each.name != "attn_norm"]
        if decoder.feed_forward and decoder.gated_mlp:
            found.append(_gated(decoder, layer))
    if not decoder.tied_head and decoder.norm.weight:
        layer = len(decoder.layers)
        norm = _norm(decoder, "output_norm")
        found.append(Coupling(layer, "output_norm", ("output.weight",), norm, decoder.hidden_size))
    return tuple(found)


def left_out(decoder: Decoder) -> dict[str, str]:
    """Why a part of the network has no coupling, by the part's name; empty where all have one."""
    reasons: dict[str, str] = {}
    unscalable = "" if decoder.norm.weight else "the norm before it has no weights to divide"
    if not decoder.pre_norms:
        unscalable = "its input is the residual stream, which other parts of the network read"
    if unscalable:
        reasons |= dict.fromkeys(_attention(decoder) + _feed_forward(decoder), unscalable)
    if decoder.qkv_clip is not None:
        reasons["attn_output"] = "values are clipped, which does not pass factors on"
    if any(layer.scan and not layer.scan.heads for layer in decoder.layers):
        reasons["ssm_x"] = "its input comes out of silu, which does not pass factors on"
        reasons["ssm_out"] = "its input is a sum with what other parts of the layer read"
    if decoder.feed_forward and not decoder.gated_mlp:
        reasons["ffn_down"] = (
            f"its input comes out of {decoder.activation}, which does not pass factors on"
        )
    if decoder.tied_head:
        reasons["output"] = (
            "the head is the embedding, whose rows other parts of the network look up"
        )
    elif not decoder.norm.weight:
        reasons["output"] = "the norm before it has no weights to divide"
    return reasons


def _norm(decoder: Decoder, name: str) -> tuple[Absorber, ...]:
    """A norm's weight, and its bias where it has one."""
    weight = Absorber(f"{name}.weight", offset=float(decoder.norm.offset))
    return (weight, Absorber(f"{name}.bias")) if decoder.norm.biased else (weight,)


def _rows(role: str, biased: bool, first: int = 0) -> tuple[Absorber, ...]:
    """Rows of a product from ``first`` on, and their biases where it has them."""
    weight = Absorber(f"{role}.weight", first)
    return (weight, Absorber(f"{role}.bias", first)) if biased else (weight,)


def _attention(decoder: Decoder) -> list[str]:
    """The products that read what attention is given."""
    return ["attn_qkv"] if decoder.fused_qkv else ["attn_q", "attn_k", "attn_v"]


def _feed_forward(decoder: Decoder) -> list[str]:
    """The products that read what the feed-forward is given."""
    gated = decoder.gated_mlp and not decoder.fused_gate_up
    return ["ffn_gate", "ffn_up"] if gated else ["ffn_up"]


def _norms(decoder: Decoder, layer: int) -> list[Coupling]:
    """Norms to the products that read them: one for attention and feed-forward, or one each."""
    if not decoder.pre_norms or not decoder.norm.weight:
        return []
    attention, feed_forward = _attention(decoder), _feed_forward(decoder)
    if decoder.layers[layer].convolution is not None:
        attention = ["shortconv.in_proj"]
    elif decoder.layers[layer].scan is not None:
        attention = ["ssm_in"]
    readers = {"attn_norm": attention, "ffn_norm": feed_forward}
    if not decoder.feed_forward:
        readers = {"attn_norm": attention}
    if decoder.shared_norm:
        readers = {"attn_norm": attention + feed_forward}
    return [
        Coupling(
            layer,
            name,
            tuple(f"blk.{layer}.{part}.weight" for part in parts),
            _norm(decoder, f"blk.{layer}.{name}"),
            decoder.hidden_size,
        )
        for name, parts in readers.items()
    ]


def _values(decoder: Decoder, layer: int) -> Coupling:
    fused = decoder.fused_qkv
    part, first = ("attn_qkv", decoder.query_size + decoder.kv_size) if fused else ("attn_v", 0)
    return Coupling(
        layer,
        "attn_v",
        (f"blk.{layer}.attn_output.weight",),
        _rows(f"blk.{layer}.{part}", decoder.qkv_bias, first),
        decoder.head_dim,
        decoder.kv_heads,
        decoder.heads // decoder.kv_heads,
    )


def _convolved(decoder: Decoder, layer: int) -> Coupling:
    """The last of the three parts of its input product to its output product."""
    settings, role = decoder.layers[layer].convolution, f"blk.{layer}.shortconv"
    assert settings is not None
    absorbers = _rows(f"{role}.in_proj", settings.biased, 2 * decoder.hidden_size)
    if settings.biased:
        absorbers = (*absorbers, Absorber(f"{role}.conv.bias"))
    return Coupling(
        layer,
        "shortconv.in_proj",
        (f"{role}.out_proj.weight",),
        absorbers,
        decoder.hidden_size,
    )


def _scanned(decoder: Decoder, layer: int, scan: StateSpace) -> Coupling:
    """Mamba 2's norm before the output product."""
    norm = (Absorber(f"blk.{layer}.ssm_norm.weight"),)
    return Coupling(layer, "ssm_norm", (f"blk.{layer}.ssm_out.weight",), norm, scan.inner)


def _gated(decoder: Decoder, layer: int) -> Coupling:
    first = decoder.ffn_size if decoder.fused_gate_up else 0
    return Coupling(
        layer,
        "ffn_up",
        (f"blk.{layer}.ffn_down.weight",),
        _rows(f"blk.{layer}.ffn_up", decoder.mlp_bias, first),
        decoder.ffn_size,
    )
