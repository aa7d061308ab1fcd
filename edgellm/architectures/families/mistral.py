"""Mistral: Llama with a sliding window in every layer (version 0.1), or with none (null)."""

from __future__ import annotations

from edgellm.architectures.config import LAYER_TYPES, Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufGraph, GgufLayout
from edgellm.errors import UnsupportedModel


def read(config: Config) -> Decoder:
    """transformers takes a window of 4096 where the key is missing: that is not guessed here."""
    shape = llama.read_shape(config)
    window = None
    if config.has("sliding_window"):
        window = config.integer("sliding_window")
    elif not config.states("sliding_window"):
        raise UnsupportedModel(
            f"{config.where}: the key sliding_window is missing; set it to the window that the "
            f"model was trained with, or to null for none"
        )
    if config.has("layer_types"):
        wanted = LAYER_TYPES[window is not None]
        if set(llama.read_layer_types(config, shape.layers)) != {wanted}:
            raise UnsupportedModel(
                f"{config.where}: layer_types mixes windows, which mistral's layers do not: "
                f"set model_type to the family that was meant"
            )
    return llama.read_decoder(config, shape, "mistral", windows=(window,) * shape.layers)


MISTRAL = GgufLayout(
    "llama",
    GgufGraph(llama.GGUF_LLAMA, "silu", any_yarn=True),
    interleaved_rope=True,
    rope_factors=("rope_freqs.weight",),
)
"""As Llama's; files of that architecture are read back as Llama."""

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=MISTRAL,
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
