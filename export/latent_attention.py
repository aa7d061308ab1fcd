"""Attention over latent vectors (MLA) as ONNX nodes: what stands before and behind the attention.

The cache holds what the model compresses: by token the turned values and the latent, in place of
keys and values (``decoder.latent``). They are one head of keys that all queries share, and the same
head of values, so onnxruntime's GroupQueryAttention computes it; that wants keys and values of one
width, and a latent that is its own value is as wide. By token of MiniCPM3-4B 576 values a layer,
where expanded ones would be 7,680; of DeepSeek-V2-Lite 1,152 for 6,144. Scores take more
operations than expanded ones, by the ratio of latent to key, which a prompt feels and a token, whose
time goes with the cache that is read, does not. onnxruntime's other attentions take values of
another width, but copy the past at every token.

``attn_kv_b`` is multiplied head by head, by queries and by what they have mixed. onnxruntime has no
rounded product for that, so it stays in floats, a fiftieth of the weights.
"""

from __future__ import annotations

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
    joined = graph.node("Concat", [parts[1], absorbed], f"{name}.joined", axis=-1)
    flat = graph.integers(0, 0, heads * latent.cache_dim)
    return graph.node("Reshape", [joined, flat], f"{name}.latent")


def expanded_values(
    graph: GraphBuilder, latent: Latent, heads: int, name: str, mixed: str, values: str
) -> str:
    """Values ``[batch, sequence, heads * value_dim]`` of what attention ``mixed`` of latents.

    ``values`` is what makes them of a latent.
    """
    shape = graph.integers(0, 0, heads, latent.cache_dim)
    by_head = graph.node("Reshape", [mixed, shape], f"{name}.heads")
    ends = graph.integers(latent.rope_dim), graph.integers(latent.cache_dim)
    latents = graph.node("Slice", [by_head, *ends, graph.integers(3)], f"{name}.latents")
    heads_first = graph.node("Transpose", [latents], f"{name}.latent_heads", perm=[0, 2, 1, 3])
    taken = graph.node(
        "FusedMatMul", [heads_first, values], f"{name}.value_heads", contrib=True, transB=1
    )
    expanded = graph.node("Transpose", [taken], f"{name}.values", perm=[0, 2, 1, 3])
    flat = graph.integers(0, 0, heads * latent.value_dim)
    return graph.node("Reshape", [expanded, flat], f"{name}.expanded")
