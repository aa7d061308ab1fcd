"""What llama.cpp's graphs compute: a model that needs more is refused, or its context is capped.

llama.cpp reads most hyper-parameters from the file but builds the rest into the graph of each
architecture (src/models/ there). A difference would load without a word and answer wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.family import GgufLayout
from edgellm.errors import UnsupportedTarget, UsageError

_RMS = {Feature.ROPE, Feature.RMS_NORM, Feature.GATED_MLP, Feature.TIED_HEAD}
_SCALED_ROPE = {Feature.ROPE_LINEAR, Feature.ROPE_YARN}
_WINDOWS = {Feature.SLIDING_WINDOW, Feature.ALTERNATING_WINDOW}
"""Never refused: a graph without windows is right for contexts within the window."""


@dataclass(frozen=True, slots=True)
class Graph:
    """One architecture of llama.cpp: the features it has, and what is fixed in its code.

    ``equal_heads``: the heads together are as wide as the model.
    """

    features: frozenset[Feature]
    activation: str
    equal_heads: bool = False


GRAPHS: dict[str, Graph] = {
    "llama": Graph(
        frozenset(
            _RMS
            | _SCALED_ROPE
            | {Feature.ROPE_LLAMA3, Feature.QKV_BIAS, Feature.OUTPUT_BIAS, Feature.MLP_BIAS}
        ),
        "silu",
    ),
    "qwen2": Graph(frozenset(_RMS | _SCALED_ROPE | {Feature.QKV_BIAS}), "silu", equal_heads=True),
    "qwen3": Graph(frozenset(_RMS | _SCALED_ROPE | {Feature.QKV_BIAS, Feature.QK_NORM}), "silu"),
    "gemma3": Graph(
        frozenset(
            _RMS
            | {
                Feature.ROPE_LINEAR,
                Feature.ROPE_PER_LAYER,
                Feature.NORM_OFFSET,
                Feature.QK_NORM,
                Feature.POST_NORMS,
                Feature.EMBEDDING_SCALE,
                Feature.ATTENTION_SCALE,
            }
        ),
        "gelu_tanh",
    ),
    "gpt2": Graph(
        frozenset(
            {
                Feature.LEARNED_POSITIONS,
                Feature.LAYER_NORM,
                Feature.PLAIN_MLP,
                Feature.QKV_BIAS,
                Feature.OUTPUT_BIAS,
                Feature.MLP_BIAS,
                Feature.TIED_HEAD,
            }
        ),
        "gelu_tanh",
        equal_heads=True,
    ),
}

GEMMA3_27B_LAYERS = 62
"""llama.cpp knows Gemma 3 27B, with its other attention scale, by its number of layers."""

BF16_ROUNDING = 2.0**-8
"""Gemma's embedding scale is stored in bf16, llama.cpp computes it."""


def check_expressible(decoder: Decoder, layout: GgufLayout) -> None:
    """Raise ``UnsupportedTarget`` naming everything that llama.cpp would compute differently."""
    graph = GRAPHS.get(layout.arch)
    if graph is None:
        raise UnsupportedTarget(
            f"GGUF of the architecture {layout.arch!r} is not understood: choose --format onnx, or "
            f"a model of {', '.join(GRAPHS)}"
        )
    missing = [str(feature) for feature in decoder.features() - graph.features - _WINDOWS]
    reasons = sorted(missing) + list(_differences(decoder, layout, graph))
    if reasons:
        raise UnsupportedTarget(
            f"llama.cpp's {layout.arch} graph cannot express {'; '.join(reasons)}: "
            "choose --format onnx"
        )


def _differences(decoder: Decoder, layout: GgufLayout, graph: Graph) -> Iterator[str]:
    if decoder.activation != graph.activation:
        yield f"the activation {decoder.activation} (it has {graph.activation})"
    if graph.equal_heads and decoder.heads * decoder.head_dim != decoder.hidden_size:
        yield (
            f"{decoder.heads} heads of {decoder.head_dim} in a model of width {decoder.hidden_size}"
        )
    ropes = {layer.rope for layer in decoder.layers if layer.rope is not None}
    for rope in ropes:
        if rope.dimensions != decoder.head_dim:
            yield f"rope over {rope.dimensions} of a head's {decoder.head_dim} values"
        scaling = rope.scaling
        if scaling is None or scaling.kind != "yarn":
            continue
        if (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True):
            yield "yarn with beta_fast, beta_slow or truncate other than 32, 1 and true"
    if layout.arch == "gemma3":
        yield from _gemma3_differences(decoder)


def _gemma3_differences(decoder: Decoder) -> Iterator[str]:
    width = (
        decoder.hidden_size // decoder.heads
        if len(decoder.layers) == GEMMA3_27B_LAYERS
        else decoder.head_dim
    )
    scale = decoder.attention_scale or 1 / math.sqrt(decoder.head_dim)
    if not math.isclose(scale, 1 / math.sqrt(width), rel_tol=1e-6):
        yield f"an attention scale of {scale:g} (it has {1 / math.sqrt(width):g})"
    fixed = math.sqrt(decoder.hidden_size)
    if not math.isclose(decoder.embedding_scale, fixed, rel_tol=BF16_ROUNDING):
        yield f"an embedding scale of {decoder.embedding_scale:g} (it has {fixed:g})"
    windows = {layer.window for layer in decoder.layers} - {None}
    if len(windows) > 1:
        yield f"windows of different sizes: {sorted(w for w in windows if w)}"


def context_of(
    decoder: Decoder, layout: GgufLayout, asked: int | None
) -> tuple[int, tuple[str, ...]]:
    """The context in tokens that the file may state, and the reasons where it is not the model's.

    Raises ``UsageError`` when more is ``asked`` for than the model has.
    """
    if asked is not None and asked > decoder.context_length:
        raise UsageError(
            f"--context {asked} is more than the model's {decoder.context_length}: choose at most "
            f"{decoder.context_length}"
        )
    context, notes = decoder.context_length, []
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    if windows and not layout.window and min(windows) < context:
        context = min(windows)
        notes.append(
            f"context capped at {context} tokens instead of {decoder.context_length}: llama.cpp's "
            f"{layout.arch} graph has no sliding window, so it is right only within it"
        )
    if asked is not None and asked < context:
        context = asked
        notes.append(f"context capped at {context} tokens as asked")
    return context, tuple(notes)
