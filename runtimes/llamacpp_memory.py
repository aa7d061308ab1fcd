"""What a GGUF file takes in llama.cpp, known from its header: keys and values, layers on a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgellm.quant.ggml_types import GgmlType

if TYPE_CHECKING:
    from edgellm.source.gguf_file import GgufFile

WORKING_BYTES = 512 << 20
"""Left free on a GPU for what is computed in between, and for others."""

GEMMA3N_LAYERS = 20
"""Layers of its own keys and values, whatever its file says (llama.cpp's models/gemma3n.cpp)."""

_BLOCK = re.compile(r"blk\.(\d+)\.")


def kv_token_bytes(metadata: dict[str, Any], kind: GgmlType) -> list[int]:
    """Bytes of keys and values for one token, by layer. Windows keep all tokens here too.

    Layers that look at another's keys and values, or do not attend, have none. Where they are kept
    as one latent vector (MLA, arXiv 2405.04434), values are a part of the keys. Without flash
    attention, which float32 does without here, the values of all layers are as wide as the widest.
    """
    arch = metadata["general.architecture"]

    def of_attention(key: str, otherwise: Any = 0) -> Any:
        return metadata.get(f"{arch}.attention.{key}", otherwise)

    layers = int(metadata.get(f"{arch}.block_count", 0))
    heads = _by_layer(of_attention("head_count"), layers)
    kv_heads = _by_layer(of_attention("head_count_kv", heads), layers)
    default = int(metadata.get(f"{arch}.embedding_length", 0)) // max(1, 1, *heads)
    key, value = (int(of_attention(each, default)) for each in ("key_length", "value_length"))
    widths = {
        False: (key, value),
        True: (
            int(of_attention("key_length_swa", key)),
            int(of_attention("value_length_swa", value)),
        ),
    }
    windows = _windows(of_attention("sliding_window_pattern", None), layers)
    keys = [count * widths[window][0] for count, window in zip(kv_heads, windows, strict=True)]
    values = [count * widths[window][1] for count, window in zip(kv_heads, windows, strict=True)]
    if of_attention("key_length_mla"):
        values = [0] * layers
    elif kind.name == "f32":
        widest = max(values, default=0)
        values = [widest if each else 0 for each in keys]
    own = GEMMA3N_LAYERS if arch == "gemma3n" else layers - int(of_attention("shared_kv_layers"))
    return [
        (each_key + each_value) * kind.block_bytes // kind.block if layer < own else 0
        for layer, (each_key, each_value) in enumerate(zip(keys, values, strict=True))
    ]


def layers_that_fit(stored: GgufFile, kv_by_layer: Sequence[int], room_bytes: int) -> int:
    """How many layers, the output counted as the last, fit into ``room_bytes`` of a GPU's memory.

    ``kv_by_layer``: bytes of keys and values that each layer brings along.
    """
    blocks = list(kv_by_layer)
    output = 0
    for name, tensor in stored.tensors.items():
        found = _BLOCK.match(name)
        if found:
            blocks[int(found[1])] += tensor.nbytes
        elif name.startswith("output") or "output.weight" not in stored.tensors:
            output += tensor.nbytes
    left = room_bytes - WORKING_BYTES - output
    if left < 0:
        return 0
    count = 1
    for nbytes in reversed(blocks):
        left -= nbytes
        if left < 0:
            return count
        count += 1
    return count


def _by_layer(value: int | Sequence[int], layers: int) -> list[int]:
    return [int(value)] * layers if isinstance(value, int) else [int(each) for each in value]


def _windows(pattern: int | Sequence[bool] | None, layers: int) -> list[bool]:
    """Which layers attend within a window: listed, or all but every ``pattern``-th."""
    if pattern is None:
        return [False] * layers
    if isinstance(pattern, int):
        return [bool(pattern) and layer % pattern < pattern - 1 for layer in range(layers)]
    return [bool(each) for each in pattern]
