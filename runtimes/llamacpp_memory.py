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

_BLOCK = re.compile(r"blk\.(\d+)\.")


def kv_token_bytes(metadata: dict[str, Any], kind: GgmlType) -> list[int]:
    """Bytes of keys and values for one token, by layer. Windows keep all tokens here too."""
    arch = metadata["general.architecture"]
    layers = int(metadata.get(f"{arch}.block_count", 0))
    heads = _by_layer(metadata.get(f"{arch}.attention.head_count", 0), layers)
    kv_heads = _by_layer(metadata.get(f"{arch}.attention.head_count_kv", heads), layers)
    default = int(metadata.get(f"{arch}.embedding_length", 0)) // max(1, 1, *heads)
    key = int(metadata.get(f"{arch}.attention.key_length", default))
    value = int(metadata.get(f"{arch}.attention.value_length", default))
    return [count * (key + value) * kind.block_bytes // kind.block for count in kv_heads]


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
