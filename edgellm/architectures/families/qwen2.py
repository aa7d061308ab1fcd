"""Qwen 2 and 2.5: Llama with biases on q, k and v, and windows in upper layers if asked for."""

from __future__ import annotations

from edgellm.architectures.config import WINDOWED, Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.families import llama
from edgellm.architectures.family import Family, GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import built_like_llama


def read_windows(config: Config, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by ``layer_types`` if listed, else from ``max_window_layers`` up.

    Without ``use_sliding_window`` there is none, whatever the other keys hold.
    """
    switched_on = config.flag("use_sliding_window", False)
    config.skip("sliding_window", "max_window_layers")
    window = None
    if switched_on and config.has("sliding_window"):
        window = config.integer("sliding_window")
    if config.has("layer_types"):
        types = llama.read_layer_types(config, layers)
        if window is None and WINDOWED in types:
            raise config.refusal(
                "layer_types", types, "no windows while use_sliding_window or sliding_window is off"
            )
        return tuple(window if kind == WINDOWED else None for kind in types)
    if window is None:
        return (None,) * layers
    first = config.integer("max_window_layers", minimum=0)
    return tuple(window if index >= first else None for index in range(layers))


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config)
    return llama.read_decoder(
        config, shape, "qwen2", windows=read_windows(config, shape.layers), qkv_bias=True
    )


GGUF_FEATURES = llama.GGUF_FEATURES | {Feature.ROPE_YARN, Feature.QKV_BIAS}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout(
        "qwen2",
        GgufGraph(GGUF_FEATURES, "silu", square_attention=True),
        config=built_like_llama,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
