"""What mlx-lm's models compute: a model that needs more is refused, or its context is capped.

mlx-lm reads some keys of config.json and passes over the others, among them most that transformers
5 introduced: a folder with these alone would load without a word and answer wrongly. So the keys
that it does read are written from the ``Decoder`` (``mlx_lm/models`` of mlx-lm 0.32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.architectures.decoder import Activation, Decoder, Feature, Rope
from edgellm.architectures.rope import yarn_attention_factor
from edgellm.errors import UnsupportedTarget
from edgellm.export.context import capped_context
from edgellm.quant import floats

CONTEXT_OF_LISTED = 131072
"""The trained context that makes mlx-lm scale nothing beside the frequencies of its longrope."""

SAID_OTHERWISE = ("rope_parameters", "layer_types", "torch_dtype", "quantization_config")
"""Keys of a source's config that are left out: what mlx-lm reads in their place is written."""

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """One model of mlx-lm: the features that it has, and those that it cannot be without.

    ``settings`` gives the keys of config.json which depend on more than the source's own config.
    ``window``: sliding windows are computed; else answers are right within the window alone.
    """

    features: frozenset[Feature]
    activation: Activation
    settings: Callable[[Decoder], Settings]
    always: frozenset[Feature] = frozenset()
    square_attention: bool = False
    window: bool = False


def check_expressible(decoder: Decoder) -> Graph:
    """The model of mlx-lm; ``UnsupportedTarget`` names all that it would compute differently."""
    graph = GRAPHS.get(decoder.family)
    if graph is None:
        raise UnsupportedTarget(
            f"mlx-lm's {decoder.family} is not understood: choose --format gguf or onnx, or a "
            f"model of {', '.join(GRAPHS)}"
        )
    features = decoder.features()
    reasons = sorted(map(str, features - graph.features))
    reasons += sorted(f"a model without {feature}" for feature in graph.always - features)
    reasons += _differences(decoder, graph)
    if reasons:
        raise UnsupportedTarget(
            f"mlx-lm's {decoder.family} cannot express {'; '.join(reasons)}: choose --format onnx "
            "or gguf"
        )
    return graph


def context_of(decoder: Decoder, graph: Graph) -> tuple[int, tuple[str, ...]]:
    """The context in tokens that answers are right for, and why where it is not the model's."""
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    usable = min(windows) if windows and not graph.window else None
    because = f"mlx-lm's {decoder.family} has no sliding window, so it is right only within it"
    return capped_context(decoder.context_length, None, usable, because)


def notes_of(decoder: Decoder) -> Iterator[str]:
    """What mlx-lm rounds differently, for the user to know."""
    scale = decoder.embedding_scale
    rounded = float(floats.rounded(np.array([scale], np.float32), "bf16")[0])
    if not math.isclose(rounded, scale, rel_tol=1e-6):
        yield f"mlx-lm rounds the embedding's scale {scale:g} to bf16: {rounded:g}"


def _differences(decoder: Decoder, graph: Graph) -> Iterator[str]:
    if decoder.activation != graph.activation:
        yield f"the activation {decoder.activation} (it has {graph.activation})"
    if graph.square_attention and decoder.query_size != decoder.hidden_size:
        yield (
            f"{decoder.heads} heads of {decoder.head_dim} in a model of width {decoder.hidden_size}"
        )
    if Feature.OUTPUT_BIAS in graph.features and decoder.qkv_bias != decoder.output_bias:
        yield "biases on q, k and v or on the attention output alone (it has both or none)"
    for rope in {layer.rope for layer in decoder.layers if layer.rope is not None}:
        if rope.dimensions != decoder.head_dim:
            yield f"rope over {rope.dimensions} of a head's {decoder.head_dim} values"
        if rope.scaling is not None and not rope.scaling.truncate:
            yield "yarn whose bounds are not rounded to whole pairs (truncate: false)"
        if rope.scaling and rope.scaling.kind != "yarn" and rope.scaling.attention_factor != 1.0:
            yield f"an attention factor of {rope.scaling.attention_factor:g} without yarn"
    if decoder.family == "gemma3_text":
        yield from _gemma3_differences(decoder)
    if decoder.family == "gpt2" and decoder.ffn_size != 4 * decoder.hidden_size:
        yield f"a feed-forward of {decoder.ffn_size} (it has {4 * decoder.hidden_size})"


def _gemma3_differences(decoder: Decoder) -> Iterator[str]:
    local = [layer for layer in decoder.layers if layer.window is not None]
    if len(set(local)) > 1:
        yield "local layers that differ in window or rope"
    if any(layer.rope and layer.rope.scaling for layer in local):
        yield "rope scaling in local layers"
    every = _global_every(decoder)
    if [layer.window is None for layer in decoder.layers] != [
        number % every == 0 for number in range(1, len(decoder.layers) + 1)
    ]:
        yield "global layers that are not every n-th"


def _global_every(decoder: Decoder) -> int:
    """Every how many layers one is global; 1 where none is."""
    found = (n for n, layer in enumerate(decoder.layers, start=1) if layer.window is None)
    return next(found, 1)


def _rotary(decoder: Decoder) -> Settings:
    """Of models with one rope; window and kinds of layers are left out, for none is computed."""
    theta, scaling = _scaled(decoder.layers[0].rope)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _gemma3(decoder: Decoder) -> Settings:
    overall = next(layer.rope for layer in decoder.layers if layer.window is None)
    local = next((layer for layer in decoder.layers if layer.window is not None), None)
    theta, scaling = _scaled(overall)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_base_freq": _scaled(local.rope if local else overall)[0],
        "sliding_window": local.window if local else decoder.context_length,
        "sliding_window_pattern": _global_every(decoder),
    }


def _gpt2(decoder: Decoder) -> Settings:
    return {"n_ctx": decoder.learned_positions}


def _scaled(rope: Rope | None) -> tuple[float, Settings | None]:
    """The base and ``rope_scaling``, in the words that transformers 4 and mlx-lm share."""
    assert rope is not None
    scaling = rope.scaling
    if scaling is None:
        return rope.theta, None
    stated: Settings = {"rope_type": scaling.kind}
    if scaling.kind == "factors":
        stated = {
            "rope_type": "longrope",
            "original_max_position_embeddings": CONTEXT_OF_LISTED,
            "short_factor": list(scaling.factors),
            "long_factor": list(scaling.factors),
            "attention_factor": 1.0,
        }
        return rope.theta, stated
    stated["factor"] = scaling.factor
    if scaling.kind != "linear":
        stated["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        stated["low_freq_factor"] = scaling.low_freq_factor
        stated["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        stated["beta_fast"], stated["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        stated["attention_factor"] = scaling.attention_factor
        if not math.isclose(scaling.attention_factor, yarn_attention_factor(scaling.factor)):
            # mlx-lm has the factor as 1 + 0.1 mscale ln(factor)
            stated["mscale"] = (scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor))
    return rope.theta, stated


_ROTARY = {
    Feature.ROPE,
    Feature.ROPE_LINEAR,
    Feature.ROPE_YARN,
    Feature.ROPE_LLAMA3,
    Feature.ROPE_FACTORS,
    Feature.RMS_NORM,
    Feature.GATED_MLP,
    Feature.TIED_HEAD,
    Feature.SLIDING_WINDOW,
    Feature.ALTERNATING_WINDOW,
}
_OF_LLAMA = {Feature.QKV_BIAS, Feature.OUTPUT_BIAS, Feature.MLP_BIAS}
_OF_GEMMA3 = {
    Feature.NORM_OFFSET,
    Feature.QK_NORM,
    Feature.POST_NORMS,
    Feature.EMBEDDING_SCALE,
}
_GPT2 = {
    Feature.LEARNED_POSITIONS,
    Feature.LAYER_NORM,
    Feature.PLAIN_MLP,
    Feature.QKV_BIAS,
    Feature.OUTPUT_BIAS,
    Feature.MLP_BIAS,
    Feature.TIED_HEAD,
}

_LLAMA = Graph(frozenset(_ROTARY | _OF_LLAMA), "silu", _rotary)

GRAPHS: dict[str, Graph] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Graph(
        frozenset(_ROTARY | {Feature.QKV_BIAS}),
        "silu",
        _rotary,
        always=frozenset({Feature.QKV_BIAS}),
        square_attention=True,
    ),
    "qwen3": Graph(
        frozenset(_ROTARY | {Feature.QK_NORM}),
        "silu",
        _rotary,
        always=frozenset({Feature.QK_NORM}),
    ),
    "gemma3_text": Graph(
        frozenset(_ROTARY | _OF_GEMMA3 | {Feature.ROPE_PER_LAYER, Feature.ATTENTION_SCALE}),
        "gelu_tanh",
        _gemma3,
        always=frozenset(_OF_GEMMA3),
        window=True,
    ),
    "gpt2": Graph(
        frozenset(_GPT2), "gelu_tanh", _gpt2, always=frozenset(_GPT2), square_attention=True
    ),
}
"""By ``model_type``."""
