"""The head of a GGUF file: keys and values, and where each tensor's data will lie."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.gguf_writer import GGUFWriter, WriterState

from edgellm.errors import UnsupportedTarget

ALIGNMENT: int = GGUF_DEFAULT_ALIGNMENT
"""Every tensor's data begins at a multiple of this, in bytes."""

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

ARCHITECTURE = "general.architecture"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the head names it: ``shape`` is ``[out, in]``, which the file holds reversed."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """``content`` ends where the first tensor begins; ``offsets`` are from the file's start."""

    content: bytes
    offsets: tuple[int, ...]
    total_bytes: int


def gguf_head(metadata: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Head:
    """The head of a file with ``metadata`` (``general.architecture`` among it) and ``tensors``.

    Integers are stored as uint32 and lists of them as int32, floats as float32, as llama.cpp reads
    them. Empty texts and lists are left out. The same input gives the same bytes. Raises
    ``UnsupportedTarget`` for a number that does not fit.
    """
    writer = GGUFWriter(None, metadata[ARCHITECTURE])
    for key, value in metadata.items():
        if key != ARCHITECTURE:
            _add(writer, key, value)
    for tensor in tensors:
        kind = GGMLQuantizationType(tensor.ggml_type)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind
        )
    # The writer would open a file by itself, but takes one that is open already.
    buffer = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, buffer)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    content = buffer.getvalue()
    content += bytes(_padded(len(content)) - len(content))
    offsets, end = [], len(content)
    for tensor in tensors:
        offsets.append(end)
        end += _padded(tensor.nbytes)
    return Head(content, tuple(offsets), end)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        if abs(value) > LARGEST_FLOAT32:
            raise UnsupportedTarget(
                f"{key} is {value:g}, beyond the float32 that GGUF keeps it in: check config.json"
            )
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list | tuple | bytes):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key} cannot be stored in GGUF: {type(value).__name__}")


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
