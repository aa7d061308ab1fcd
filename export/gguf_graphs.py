"""What llama.cpp's graphs compute: a model that needs more is refused, or its context is capped.

llama.cpp reads most hyper-parameters from the file but builds the rest into the graph of each
architecture (src/models/ there). A difference would load without a word and answer wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.architectures.decoder import Activation, Decoder, Feature
from edgellm.architectures.family import GgufLayout
from edgellm.architectures.gguf_metadata import GEMMA3_27B_LAYERS, has_keys
from edgellm.errors import UnsupportedTarget
from edgellm.export.context import capped_context


@dataclass(frozen=True, slots=True)
class Graph:
    """One architecture of llama.cpp: the features it has, and what is fixed in its code.

    ``square_attention``: the heads together are as wide as the model. ``any_yarn``: settings that
    no key says are baked into ``rope_freqs.weight``.
    """

    features: frozenset[Feature]
    activation: Activation
    square_attention: bool = False
    any_yarn: bool = False


_WINDOWS = {Feature.SLIDING_WINDOW, Feature.ALTERNATING_WINDOW}
"""Never refused: a graph without windows is right for contexts within the window."""

_BUILT_LIKE_LLAMA = _WINDOWS | {
    Feature.ROPE,
    Feature.ROPE_LINEAR,
    Feature.RMS_NORM,
    Feature.GATED_MLP,
    Feature.TIED_HEAD,
}
_QWEN = _BUILT_LIKE_LLAMA | {Feature.ROPE_YARN, Feature.QKV_BIAS}
_LLAMA = _QWEN | {
    Feature.ROPE_LLAMA3,
    Feature.ROPE_FACTORS,
    Feature.OUTPUT_BIAS,
    Feature.MLP_BIAS,
}
_GEMMA3 = _BUILT_LIKE_LLAMA | {
    Feature.ROPE_PER_LAYER,
    Feature.NORM_OFFSET,
    Feature.QK_NORM,
    Feature.POST_NORMS,
    Feature.EMBEDDING_SCALE,
    Feature.ATTENTION_SCALE,
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

GRAPHS: dict[str, Graph] = {
    "llama": Graph(frozenset(_LLAMA), "silu", any_yarn=True),
    "qwen2": Graph(frozenset(_QWEN), "silu", square_attention=True),
    "qwen3": Graph(frozenset(_QWEN | {Feature.QK_NORM}), "silu"),
    "gemma3": Graph(frozenset(_GEMMA3), "gelu_tanh"),
    "gpt2": Graph(frozenset(_GPT2), "gelu_tanh", square_attention=True),
}


def check_expressible(decoder: Decoder, arch: str) -> None:
    """Raise ``UnsupportedTarget`` naming everything that llama.cpp would compute differently."""
    graph = GRAPHS.get(arch)
    if graph is None:
        raise UnsupportedTarget(
            f"GGUF of the architecture {arch!r} is not understood: choose --format onnx, or a "
            f"model of {', '.join(GRAPHS)}"
        )
    reasons = sorted(map(str, decoder.features() - graph.features))
    reasons += _differences(decoder, graph)
    if arch == "gemma3":
        reasons += _gemma3_differences(decoder)
    if reasons:
        raise UnsupportedTarget(
            f"llama.cpp's {arch} graph cannot express {'; '.join(reasons)}: choose --format onnx"
        )


def _differences(decoder: Decoder, graph: Graph) -> Iterator[str]:
    if decoder.activation != graph.activation:
        yield f"the activation {decoder.activation} (it has {graph.activation})"
    if graph.square_attention and decoder.query_size != decoder.hidden_size:
        yield (
            f"{decoder.heads} heads of {decoder.head_dim} in a model of width {decoder.hidden_size}"
        )
    for rope in {layer.rope for layer in decoder.layers if layer.rope is not None}:
        if rope.dimensions != decoder.head_dim:
            yield f"rope over {rope.dimensions} of a head's {decoder.head_dim} values"
        if rope.scaling and not graph.any_yarn and not has_keys(rope.scaling):
            yield "yarn with beta_fast, beta_slow or truncate other than 32, 1 and true"


def _gemma3_differences(decoder: Decoder) -> Iterator[str]:
    width = (
        decoder.hidden_size // decoder.heads
        if len(decoder.layers) == GEMMA3_27B_LAYERS
        else decoder.head_dim
    )
    scale, fixed = decoder.softmax_scale, 1 / math.sqrt(width)
    if not math.isclose(scale, fixed, rel_tol=1e-6):
        yield f"an attention scale of {scale:g} (it has {fixed:g})"
    fixed = math.sqrt(decoder.hidden_size)
    if not math.isclose(decoder.embedding_scale, fixed, rel_tol=1e-6):
        yield f"an embedding scale of {decoder.embedding_scale:g} (it has {fixed:g})"
    local = [layer for layer in decoder.layers if layer.window is not None]
    if len(set(local)) > 1:
        yield "local layers that differ in window or rope"
    if any(layer.rope and layer.rope.scaling for layer in local):
        yield "rope scaling in local layers"


def context_of(
    decoder: Decoder, layout: GgufLayout, asked: int | None
) -> tuple[int, tuple[str, ...]]:
    """The context in tokens that the file may state, and the reasons where it is not the model's.

    Raises ``UsageError`` when more is ``asked`` for than the model has.
    """
    windows = [layer.window for layer in decoder.layers if layer.window is not None]
    usable = min(windows) if windows and not layout.window else None
    because = (
        f"llama.cpp's {layout.arch} graph has no sliding window, so it is right only within it"
    )
    return capped_context(decoder.context_length, asked, usable, because)
