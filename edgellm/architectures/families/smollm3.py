"""SmolLM 3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama, qwen2
from edgellm.architectures.family import Family, GgufFacts, GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import built_like_llama

EVERY = 4
"""In llama.cpp's graph, and in transformers where the config lists no layers."""


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    every = config.integer("no_rope_layer_interval", EVERY)
    turned = tuple((index + 1) % every != 0 for index in range(shape.layers))
    if config.has("no_rope_layers"):  # which has a 1 where there is rope
        turned = config.flags("no_rope_layers")
        if len(turned) != shape.layers:
            raise config.refusal(
                "no_rope_layers", turned, f"one entry for each of the {shape.layers} layers"
            )
    config.skip("pretraining_tp")  # how it was trained, which its class does not read
    bias = config.flag("attention_bias", False)
    decoder = llama.read_decoder(
        config,
        shape,
        "smollm3",
        windows=qwen2.read_windows(config, shape.layers),
        default_theta=10000.0,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        tied=True,
    )
    layers = (
        layer if has_rope else replace(layer, rope=None)
        for layer, has_rope in zip(decoder.layers, turned, strict=True)
    )
    return replace(decoder, layers=tuple(layers))


def _differences(decoder: Decoder) -> Iterator[str]:
    turned = [layer.rope is not None for layer in decoder.layers]
    if turned != [(index + 1) % EVERY != 0 for index in range(len(turned))]:
        yield f"layers without rotary positions other than every {EVERY}th"


def _from_gguf(facts: GgufFacts) -> dict[str, Any]:
    return built_like_llama(facts) | {"no_rope_layer_interval": EVERY}


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "smollm3",
        GgufGraph(
            llama.GGUF_FEATURES | {Feature.ROPE_YARN, Feature.LAYERS_WITHOUT_ROPE},
            "silu",
            differences=_differences,
        ),
        interleaved_rope=True,
        config=_from_gguf,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
