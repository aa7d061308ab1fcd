"""Mamba: state-space layers alone, and what Mamba 2 has of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Norm, StateSpace
from edgellm.architectures.family import (
    SMALL_PRODUCT,
    Family,
    GgufFacts,
    GgufGraph,
    GgufLayout,
    TensorRow,
    Value,
    weight_and_bias,
)

CONTEXT = 1 << 20
"""Tokens that a config does not say, for a state has no end; as llama.cpp's converter writes."""

OF_TRAINING = (
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale",
    "time_step_init_scheme", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan",
    "chunk_size", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple",
)  # fmt: skip
"""Keys about first weights, and about how what is the same is computed."""


def read(config: Config) -> Decoder:
    hidden = config.integer("hidden_size")
    rank = -(-hidden // 16)
    if config.has("time_step_rank") and not config.says("time_step_rank", "auto"):
        rank = config.integer("time_step_rank")
    config.skip("time_step_rank")
    return read_decoder(config, "mamba", tied=True, step_rank=rank)


def read_decoder(
    config: Config,
    family: str,
    *,
    tied: bool,
    heads: int = 0,
    groups: int = 1,
    step_rank: int = 0,
) -> Decoder:
    """The keys that both share. ``tied``: whether the head is where no key says."""
    hidden = config.integer("hidden_size")
    inner = int(config.number("expand", 2.0, above=0) * hidden)
    layers = config.integer("num_hidden_layers", maximum=MOST_LAYERS)
    for key, value in {
        "intermediate_size": inner,
        "d_inner": inner,
        "d_model": hidden,
        "n_layer": layers,
        "rms_norm": True,
        "ssm_cfg": {},
        "hidden_act": "silu",
    }.items():
        config.neutral(key, value)
    config.skip(*OF_TRAINING)
    settings = StateSpace(
        inner=inner,
        state=config.integer("state_size"),
        width=config.integer("conv_kernel", 4, minimum=2),
        heads=heads,
        groups=groups,
        step_rank=step_rank,
        biased=config.flag("use_bias", False),
        convolution_bias=config.flag("use_conv_bias", True),
    )
    return Decoder(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=0,
        context_length=CONTEXT,
        heads=0,
        kv_heads=0,
        head_dim=0,
        layers=(Layer(scan=settings),) * layers,
        norm=Norm("rms", config.number("layer_norm_epsilon", above=0)),
        activation="silu",
        feed_forward=False,
        tied_head=config.flag("tie_word_embeddings", tied),
    )


def tensors(decoder: Decoder) -> Iterator[TensorRow]:
    """Every tensor, in the order of the computation."""
    hidden = decoder.hidden_size
    yield TensorRow(
        "backbone.embeddings.weight", "token_embd.weight", (decoder.vocab_size, hidden), "embedding"
    )
    for index, layer in enumerate(decoder.layers):
        assert layer.scan is not None
        source, role = f"backbone.layers.{index}", f"blk.{index}"
        yield TensorRow(f"{source}.norm.weight", f"{role}.attn_norm.weight", (hidden,), "norm")
        yield from _mixer(f"{source}.mixer", role, hidden, layer.scan)
    yield TensorRow("backbone.norm_f.weight", "output_norm.weight", (hidden,), "norm")
    if not decoder.tied_head:
        yield TensorRow("lm_head.weight", "output.weight", (decoder.vocab_size, hidden), "head")


def _mixer(source: str, role: str, hidden: int, settings: StateSpace) -> Iterator[TensorRow]:
    inner, state, rank = settings.inner, settings.state, settings.step_rank
    channels = settings.convolved
    yield from weight_and_bias(
        f"{source}.in_proj", f"{role}.ssm_in", (settings.made, hidden), "linear", settings.biased
    )
    yield from weight_and_bias(
        f"{source}.conv1d",
        f"{role}.ssm_conv1d",
        (channels, 1, settings.width),
        "convolution",
        settings.convolution_bias,
    )
    if settings.heads:
        yield TensorRow(f"{source}.dt_bias", f"{role}.ssm_dt.bias", (settings.heads,), "bias")
        sizes: tuple[int, ...] = (settings.heads,)
    else:
        yield TensorRow(
            f"{source}.x_proj.weight", f"{role}.ssm_x.weight", (rank + 2 * state, inner), "linear"
        )
        yield from weight_and_bias(
            f"{source}.dt_proj", f"{role}.{SMALL_PRODUCT}", (inner, rank), "small", biased=True
        )
        sizes = (inner, state)
    yield TensorRow(f"{source}.A_log", f"{role}.ssm_a", sizes, "decay")
    yield TensorRow(f"{source}.D", f"{role}.ssm_d", sizes[:1], "bias")
    if settings.heads:
        yield TensorRow(f"{source}.norm.weight", f"{role}.ssm_norm.weight", (inner,), "norm")
    yield from weight_and_bias(
        f"{source}.out_proj", f"{role}.ssm_out", (hidden, inner), "linear", settings.biased
    )


GGUF_FEATURES = frozenset(
    {
        Feature.STATE_SPACE,
        Feature.NO_FEED_FORWARD,
        Feature.RMS_NORM,
        Feature.TIED_HEAD,
    }
)


def settings_of(decoder: Decoder) -> StateSpace:
    """Of all layers, which are alike."""
    found = decoder.layers[0].scan
    assert found is not None
    return found


def differences(decoder: Decoder) -> Iterator[str]:
    """What both graphs fix."""
    if not settings_of(decoder).convolution_bias:
        yield "convolutions without biases"


def _differences(decoder: Decoder) -> Iterator[str]:
    yield from differences(decoder)
    if settings_of(decoder).inner != 2 * decoder.hidden_size:
        yield "an inner width other than twice the model's"


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    """The keys that both share."""
    settings = settings_of(decoder)
    return {
        "ssm.conv_kernel": settings.width,
        "ssm.inner_size": settings.inner,
        "ssm.state_size": settings.state,
        "ssm.time_step_rank": settings.heads or settings.step_rank,
    }


def from_gguf(facts: GgufFacts) -> dict[str, Any]:
    """The config's keys that both share."""
    keys = facts.keys
    hidden = keys.integer("embedding_length")
    for key in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        keys.neutral(key, 0)
    keys.neutral("ssm.dt_b_c_rms", False)
    keys.skip("context_length")
    expand = keys.integer("ssm.inner_size") / hidden
    return {
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count", maximum=MOST_LAYERS),
        "state_size": keys.integer("ssm.state_size"),
        "conv_kernel": keys.integer("ssm.conv_kernel"),
        "expand": int(expand) if math.floor(expand) == expand else expand,
        "layer_norm_epsilon": keys.number("attention.layer_norm_rms_epsilon"),
    }


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return from_gguf(facts) | {"time_step_rank": facts.keys.integer("ssm.time_step_rank")}


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    read=read,
    tensors=tensors,
    gguf=GgufLayout(
        "mamba",
        GgufGraph(GGUF_FEATURES, "silu", differences=_differences),
        keys=gguf_keys,
        config=_from_gguf,
    ),
    base_prefix="backbone.",
)
