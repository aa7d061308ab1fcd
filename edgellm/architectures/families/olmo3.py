"""OLMo 3: OLMo 2 with windows in three layers of four, whose rope is never scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgellm.architectures.config import LAYER_TYPES, WINDOWED, Config
from edgellm.architectures.decoder import Decoder, Feature, Rope
from edgellm.architectures.families import llama, olmo2
from edgellm.architectures.family import Family, GgufGraph, GgufLayout, Value
from edgellm.architectures.gguf_metadata import every_but, window_keys
from edgellm.architectures.rope import StatedRope, rope_of_section


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, kv_heads_required=False)
    usual = every_but(olmo2.GGUF_PATTERN, shape.layers)
    types = tuple(LAYER_TYPES[is_local] for is_local in usual)
    if config.has("layer_types"):
        types = llama.read_layer_types(config, shape.layers)
    window = config.integer("sliding_window") if WINDOWED in types else None
    config.skip("sliding_window")
    windows = tuple(window if kind == WINDOWED else None for kind in types)
    ropes = _ropes(config, shape)
    decoder = olmo2.reordered(config, shape, "olmo3", windows, ropes and ropes[1])
    local = ropes[0][0] if ropes else _unscaled(decoder.layers[0].rope)
    layers = (
        layer if layer.window is None else replace(layer, rope=local) for layer in decoder.layers
    )
    return replace(decoder, layers=tuple(layers))


def _ropes(config: Config, shape: llama.Shape) -> tuple[StatedRope, StatedRope] | None:
    """The ropes of local and of global layers, where the config has one for each."""
    parameters = config.section("rope_parameters") if config.has("rope_parameters") else None
    if parameters is None or not all(parameters.has(kind) for kind in LAYER_TYPES):
        return None
    context = shape.context_length
    local, overall = (
        rope_of_section(parameters.section(kind), shape.head_dim, context, None, context)
        for kind in (WINDOWED, LAYER_TYPES[0])
    )
    return local, overall


def _unscaled(rope: Rope | None) -> Rope | None:
    """Where the config has one rope for all layers, local ones leave its scaling out."""
    return rope and replace(rope, scaling=None)


def _gguf_keys(decoder: Decoder) -> dict[str, Value]:
    keys = window_keys(decoder, olmo2.GGUF_PATTERN)
    local = [layer.rope for layer in decoder.layers if layer.window is not None]
    return keys | ({"rope.freq_base_swa": local[0].theta} if local and local[0] else {})


def _differences(decoder: Decoder) -> Iterator[str]:
    local = [layer for layer in decoder.layers if layer.window is not None]
    if any(layer.rope and layer.rope.scaling for layer in local):
        yield "rope scaling in local layers"


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    read=read,
    tensors=olmo2.tensors,
    gguf=GgufLayout(
        "olmo2",
        GgufGraph(
            (olmo2.GGUF_FEATURES | {Feature.ROPE_PER_LAYER}) - {Feature.TIED_HEAD},
            "silu",
            square_attention=True,
            differences=_differences,
        ),
        window=True,
        keys=_gguf_keys,
    ),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
