"""Attention over latent vectors (MLA) as ONNX nodes: what stands before and behind the cache.

The cache holds what the model compresses: by token the turned values and the latent, in place of
keys and values (``decoder.latent``). They are one head of keys that all queries share, and that
head's values too. An attention of one query head (onnxruntime's GroupQueryAttention, as for other
models) does nothing but append them in place; it keeps keys and values, of one width, so what is
cached is both. Our runtime keeps one memory for the two, others two. Values by token and layer,
with one memory, two, and with keys and values expanded and as wide as that attention wants them:
MiniCPM3-4B 288, 576, 7,680; DeepSeek-V2-Lite 576, 1,152, 6,144. MiniCPM3-4B's expanded cache of
4,096 tokens would be 7.8 GB, that of latents is 0.3.

What is asked of the cache are plain products, in which all heads of all tokens of a step are rows:
GroupQueryAttention would read the shared head once for every query head. Milliseconds of one
layer's attention for a token, one thread of an AMD EPYC: in products (and the appending), by
GroupQueryAttention, and by it with expanded keys and values. V2-Lite, 512 tokens cached: 0.2, 0.7,
0.2; 4,000: 2.6, 19, 3.1. MiniCPM3: 0.2, 0.8, 0.4; 1.3, 23, 14. A prompt pays, for its scores take
more operations by the ratio of latent to key: 128 tokens behind 896 94, 151, 46 and 212, 242, 71.
With a cache in int8, which no plain product reads, GroupQueryAttention computes all of it.

``attn_kv_b`` is multiplied head by head, by queries and by what they have mixed. onnxruntime has no
rounded product for that, so it stays in floats, a fiftieth of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from edgellm.architectures.latent import Latent
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.quant.grid import GRIDS, Grid
from edgellm.tensors import TensorRef

BY_HEAD = "attn_kv_b.weight"
"""End of the role of the weight that is multiplied head by head."""


def expansion(
    graph: GraphBuilder, latent: Latent, heads: int, ref: TensorRef, body: Grid
) -> tuple[str, str]:
    """What makes keys ``[heads, plain_dim, rank]`` and values ``[heads, value_dim, rank]``.

    Stored as one tensor, in f32 where the other products are and in f16 else; parted when
    onnxruntime opens the model.
    """
    grid = body if body.name == "f32" else GRIDS["f16"]
    element = TensorProto.FLOAT if grid.name == "f32" else TensorProto.FLOAT16
    tensor = graph.store(ref.role, [ref], grid, "float")
    shape = [heads, latent.head_rows, latent.rank]
    whole = graph.computed(graph.stored(tensor.arrays[0], element, shape), element)
    parts = [f"{ref.role}.{part}" for part in ("keys", "values")]
    widths = graph.integers(latent.plain_dim, latent.value_dim)
    graph.node("Split", [whole, widths], f"{ref.role}.parts", outputs=parts, axis=1)
    return parts[0], parts[1]


def absorbed_queries(
    graph: GraphBuilder, latent: Latent, heads: int, name: str, queries: str, keys: str
) -> str:
    """Queries of latents ``[batch, sequence, heads * cache_dim]``, what is to be turned first.

    ``queries`` are of keys, ``keys`` what makes these of a latent.
    """
    width = latent.plain_dim + latent.rope_dim
    by_head = graph.node("Reshape", [queries, graph.integers(0, 0, heads, width)], f"{name}.heads")
    parts = [f"{name}.plain", f"{name}.rope"]
    widths = graph.integers(latent.plain_dim, latent.rope_dim)
    graph.node("Split", [by_head, widths], f"{name}.parts", outputs=parts, axis=-1)
    heads_first = graph.node("Transpose", [parts[0]], f"{name}.plain_heads", perm=[0, 2, 1, 3])
    taken = graph.node("MatMul", [heads_first, keys], f"{name}.absorbed_heads")
    absorbed = graph.node("Transpose", [taken], f"{name}.absorbed", perm=[0, 2, 1, 3])
    joined = filled(graph, latent, f"{name}.joined", [parts[1], absorbed], 4)
    flat = graph.integers(0, 0, heads * latent.cache_dim)
    return graph.node("Reshape", [joined, flat], f"{name}.latent")


def filled(
    graph: GraphBuilder, latent: Latent, name: str, parts: Sequence[str], dimensions: int
) -> str:
    """Turned values and a latent behind each other, filled up with zeros to what is cached."""
    missing = latent.cache_dim - latent.width
    if not missing:
        return graph.node("Concat", list(parts), name, axis=-1)
    joined = graph.node("Concat", list(parts), f"{name}.width", axis=-1)
    pads = graph.integers(*[0] * (2 * dimensions - 1), missing)
    return graph.node("Pad", [joined, pads], name)


def mixed_latents(
    graph: GraphBuilder,
    latent: Latent,
    heads: int,
    scale: float,
    name: str,
    inputs: tuple[str, str, str, str],
) -> str:
    """What attention mixes of latents, ``[batch, sequence, heads * cache_dim]``.

    ``inputs``: turned queries ``[batch, sequence, heads * cache_dim]``, the latents of all tokens
    ``[batch, total, cache_dim]``, what is added to scores ``[batch, sequence, 1, total]``, and the
    total ``[1]``. All heads of all tokens are rows of one product, so latents are read once.
    """
    queries, held, seen, total = inputs
    cache_dim = latent.cache_dim
    shapes: dict[str, str] = {}
    for part, sizes in (("by_head", (0, -1, heads)), ("rows", (0, -1))):
        shapes[part] = f"latent_shape.{part}"
        if not graph.has(shapes[part]):
            graph.node("Concat", [graph.integers(*sizes), total], shapes[part], axis=0)
    rows = graph.node("Reshape", [queries, graph.integers(0, -1, cache_dim)], f"{name}.rows")
    scores = graph.node(
        "FusedMatMul", [rows, held], f"{name}.scores", contrib=True, transB=1, alpha=scale
    )
    by_head = graph.node("Reshape", [scores, shapes["by_head"]], f"{name}.scores_by_head")
    masked = graph.node("Add", [by_head, seen], f"{name}.seen")
    shares = graph.node("Softmax", [masked], f"{name}.shares", axis=-1)
    flat = graph.node("Reshape", [shares, shapes["rows"]], f"{name}.share_rows")
    mixed = graph.node("MatMul", [flat, held], f"{name}.mixed")
    return graph.node("Reshape", [mixed, graph.integers(0, -1, heads * cache_dim)], name)


def expanded_values(
    graph: GraphBuilder, latent: Latent, heads: int, name: str, mixed: str, values: str
) -> str:
    """Values ``[batch, sequence, heads * value_dim]`` of what attention ``mixed`` of latents.

    ``values`` is what makes them of a latent.
    """
    shape = graph.integers(0, 0, heads, latent.cache_dim)
    by_head = graph.node("Reshape", [mixed, shape], f"{name}.heads")
    ends = graph.integers(latent.rope_dim), graph.integers(latent.width)
    latents = graph.node("Slice", [by_head, *ends, graph.integers(3)], f"{name}.latents")
    heads_first = graph.node("Transpose", [latents], f"{name}.latent_heads", perm=[0, 2, 1, 3])
    taken = graph.node(
        "FusedMatMul", [heads_first, values], f"{name}.value_heads", contrib=True, transB=1
    )
    expanded = graph.node("Transpose", [taken], f"{name}.values", perm=[0, 2, 1, 3])
    flat = graph.integers(0, 0, heads * latent.value_dim)
    return graph.node("Reshape", [expanded, flat], f"{name}.expanded")
