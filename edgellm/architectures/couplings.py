"""Which weights share an input, and which tensors before them can be scaled without a trace.

Where a product's input is itself made by weights without a nonlinearity between, channel ``c`` of
the input may be divided by any ``s_c`` there and column ``c`` of the product multiplied by it: the
network computes the same, and rounds differently (AWQ, arXiv 2306.00978, section 3.2; SmoothQuant,
arXiv 2211.10438, section 4). Every family is described by its ``Decoder`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.architectures.decoder import Decoder, Experts, StateSpace
from edgellm.architectures.latent import Latent
from edgellm.tensors import Array


@dataclass(frozen=True, slots=True)
class Absorber:
    """A tensor before a coupling that divides by its factors: rows of a weight, or a vector.

    Factors belong to the rows (or values) from ``first`` on; with ``run``, to so many, and so on in
    runs that begin ``step`` rows apart. ``offset`` is what the network adds to
    the stored values (norms stored less one).
    """

    role: str
    first: int = 0
    offset: float = 0.0
    run: int = 0
    step: int = 0

    def places(self, count: int) -> npt.NDArray[np.intp]:
        """The row (or value) that each of ``count`` factors belongs to, ascending."""
        numbers = np.arange(count)
        if self.run:
            numbers = numbers // self.run * self.step + numbers % self.run
        return self.first + numbers


@dataclass(frozen=True, slots=True)
class Coupling:
    """Weights that share an input, and what absorbs the inverse of their factors.

    ``name`` is the tensor that makes the input (``attn_norm``, ``attn_q_a_norm``,
    ``attn_kv_a_norm``, ``attn_v``, ``shortconv.in_proj``, ``ssm_norm``, ``ffn_norm``, ``ffn_up``,
    ``output_norm``). ``consumers`` are roles of the weights ``[out, columns]`` that share it.
    ``layer`` counts the layers, the head is one more. The input's columns are ``[kv_heads, group,
    width]``: the heads of a group repeat one head of values, so that they share its factors.
    Elsewhere there is one head in one group.
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

    A layer has up to four, and more with latent attention, whose norms of latent vectors couple
    too: attention's norm to q, k and v; the rows of v to attention's output
    (softmax weighs values and does not change them); the feed-forward's norm to gate and up; the
    rows of up, which a gate only multiplies, to down. Every expert has the last of these for
    itself. A short convolution has the norm before it, and the rows of x, which are multiplied and
    summed channel by channel, to its output; a state-space layer the norm before it, and Mamba 2
    the one before its output. ``left_out`` says which are not there.
    """
    found: list[Coupling] = []
    for layer in range(len(decoder.layers)):
        before = _norms(decoder, layer)
        found += [each for each in before if each.name == "attn_norm"]
        if decoder.latent is not None:
            found += _latent_norms(decoder, layer, decoder.latent)
        scan, experts = decoder.layers[layer].scan, decoder.layers[layer].experts
        if decoder.layers[layer].convolution is not None:
            found.append(_convolved(decoder, layer))
        elif scan is not None:
            found += [_scanned(decoder, layer, scan)] if scan.heads else []
        elif decoder.qkv_clip is None:
            found.append(_values(decoder, layer))
        found += [each for each in before if each.name != "attn_norm"]
        if experts is not None:
            found += _gated_experts(experts, layer)
        elif decoder.feed_forward and decoder.gated_mlp:
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
    dense = not all(layer.experts for layer in decoder.layers)
    if decoder.feed_forward and not decoder.gated_mlp and dense:
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
    if decoder.latent is not None:
        whole = decoder.latent.query_rank is None
        return ["attn_q" if whole else "attn_q_a", "attn_kv_a_mqa"]
    return ["attn_qkv"] if decoder.fused_qkv else ["attn_q", "attn_k", "attn_v"]


def _feed_forward(decoder: Decoder) -> list[str]:
    """The products that read what the feed-forward is given."""
    gated = decoder.gated_mlp and not decoder.fused_gate_up
    return ["ffn_gate", "ffn_up"] if gated else ["ffn_up"]


def _norms(decoder: Decoder, layer: int) -> list[Coupling]:
    """Norms to the products that read them: one for attention and feed-forward, or one each."""
    if not decoder.pre_norms or not decoder.norm.weight:
        return []
    experts = decoder.layers[layer].experts
    attention, feed_forward = _attention(decoder), _feed_forward(decoder)
    if decoder.layers[layer].convolution is not None:
        attention = ["shortconv.in_proj"]
    elif decoder.layers[layer].scan is not None:
        attention = ["ssm_in"]
    if experts is not None:
        feed_forward = _readers(experts)
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


def _latent_norms(decoder: Decoder, layer: int, latent: Latent) -> list[Coupling]:
    """The norms of latent vectors to the products that read them."""
    readers = [("attn_kv_a_norm", "attn_kv_b", latent.rank)]
    if latent.query_rank is not None:
        readers = [("attn_q_a_norm", "attn_q_b", latent.query_rank), *readers]
    return [
        Coupling(
            layer,
            name,
            (f"blk.{layer}.{part}.weight",),
            _norm(decoder, f"blk.{layer}.{name}"),
            width,
        )
        for name, part, width in readers
    ]


def _latent_values(decoder: Decoder, layer: int, latent: Latent) -> Coupling:
    """The rows of each head that make values, below those that make keys."""
    rows = Absorber(
        f"blk.{layer}.attn_kv_b.weight",
        first=latent.plain_dim,
        run=latent.value_dim,
        step=latent.head_rows,
    )
    consumers = (f"blk.{layer}.attn_output.weight",)
    return Coupling(layer, "attn_v", consumers, (rows,), latent.value_dim, decoder.heads)


def _readers(experts: Experts) -> list[str]:
    """The products that read what a mixture is given; the router, which reads all of it, first."""
    shared = ["ffn_gate_shexp", "ffn_up_shexp"] if experts.shared_width else []
    gates = ["ffn_gate_inp_shexp"] if experts.shared_gate else []
    of_each = [f"ffn_{part}_exps.{n}" for n in range(experts.count) for part in ("gate", "up")]
    return ["ffn_gate_inp", *gates, *shared, *of_each]


def _values(decoder: Decoder, layer: int) -> Coupling:
    if decoder.latent is not None:
        return _latent_values(decoder, layer, decoder.latent)
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


def _gated_experts(experts: Experts, layer: int) -> Iterator[Coupling]:
    parts = [(f"exps.{expert}", experts.width) for expert in range(experts.count)]
    if experts.shared_width:
        parts.append(("shexp", experts.shared_width))
    for part, width in parts:
        yield Coupling(
            layer,
            f"ffn_up_{part}",
            (f"blk.{layer}.ffn_down_{part}.weight",),
            _rows(f"blk.{layer}.ffn_up_{part}", biased=False),
            width,
        )
