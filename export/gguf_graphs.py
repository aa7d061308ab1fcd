"""What llama.cpp's graphs compute: a model that needs more is refused, or its context is capped.

What each graph has stands in the family's file (``GgufGraph``).
"""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.decoder import Decoder
from edgellm.architectures.family import GgufGraph, GgufLayout
from edgellm.architectures.gguf_metadata import has_keys
from edgellm.errors import UnsupportedTarget
from edgellm.export.context import capped_context


def check_expressible(decoder: Decoder, layout: GgufLayout) -> None:
    """Raise ``UnsupportedTarget`` naming everything that llama.cpp would compute differently."""
    graph, features = layout.graph, decoder.features()
    reasons = sorted(map(str, features - graph.features))
    reasons += sorted(f"a model without {feature}" for feature in graph.always - features)
    reasons += _differences(decoder, graph)
    reasons += graph.differences(decoder)
    if reasons:
        raise UnsupportedTarget(
            f"llama.cpp's {layout.arch} graph cannot express {'; '.join(reasons)}: choose "
            "--format onnx"
        )


def _differences(decoder: Decoder, graph: GgufGraph) -> Iterator[str]:
    if decoder.activation not in (graph.activation, *graph.nearly):
        yield f"the activation {decoder.activation} (it has {graph.activation})"
    if graph.square_attention and decoder.query_size != decoder.hidden_size:
        yield (
            f"{decoder.heads} heads of {decoder.head_dim} in a model of width {decoder.hidden_size}"
        )
    for rope in {layer.rope for layer in decoder.layers if layer.rope is not None}:
        if rope.scaling and not graph.any_yarn and not has_keys(rope.scaling):
            yield "yarn with beta_fast, beta_slow or truncate other than 32, 1 and true"


def notes_of(decoder: Decoder, layout: GgufLayout) -> Iterator[str]:
    """What llama.cpp computes a little differently, for the user to know."""
    graph = layout.graph
    latent = decoder.latent
    if latent is not None and latent.epsilon != decoder.norm.epsilon:
        yield (
            f"llama.cpp norms latent vectors with an epsilon of {decoder.norm.epsilon:g}, where "
            f"the model has {latent.epsilon:g}: where their mean square is one, they differ by "
            f"{abs(decoder.norm.epsilon - latent.epsilon) / 2:.0e} of themselves"
        )
    if decoder.activation != graph.activation and decoder.activation in graph.nearly:
        yield (
            f"llama.cpp's {layout.arch} graph computes {graph.activation} for the model's "
            f"{decoder.activation}: they lie within 0.0005 of each other, nearer than its "
            "table of GELU in halves is exact"
        )


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
