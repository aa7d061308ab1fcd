"""Granite 3 MoE with an expert in each layer that every token passes."""

from __future__ import annotations

from dataclasses import replace

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Layer
from edgellm.architectures.families import granitemoe, llama
from edgellm.architectures.family import Family, GgufLayout


def read(config: Config) -> Decoder:
    decoder = granitemoe.read(config)
    width = config.integer("shared_intermediate_size", 0, minimum=0)

    def shared(layer: Layer) -> Layer:
        assert layer.experts is not None
        return replace(layer, experts=replace(layer.experts, shared_width=width))

    layers = tuple(shared(layer) for layer in decoder.layers)
    return replace(decoder, family="granitemoeshared", layers=layers)


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    read=read,
    tensors=granitemoe.tensors,
    gguf=GgufLayout(
        "granitemoe",
        replace(granitemoe.GRAPH, features=granitemoe.GRAPH.features | {Feature.SHARED_EXPERTS}),
        interleaved_rope=True,
        rope_factors=("rope_freqs.weight",),
        keys=granitemoe.gguf_keys,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
