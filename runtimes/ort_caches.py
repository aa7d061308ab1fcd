"""Keys and values of one ONNX session: bound as each past and its present, in one memory.

GroupQueryAttention recognizes such a pair by its address and appends in place. On the CPU the
memory is numpy's; on a device it is onnxruntime's own and never leaves it while tokens are
computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgellm.architectures.latent import VALUES_ARE_KEYS
from edgellm.hardware import free_memory_bytes
from edgellm.runtimes import limits
from edgellm.runtimes.kv_buffers import allocate, next_room

Cache = npt.NDArray[np.float32] | npt.NDArray[np.int8]
CacheType = type[np.float32] | type[np.float16] | type[np.int8]
CACHE_TYPES: dict[str, CacheType] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
"""Types of the keys and values that a graph takes, as onnxruntime names them."""

PAST, PRESENT = "past_key_values.", "present."
KEY, VALUE = ".key", ".value"


class Past(NamedTuple):
    """One input of the graph that holds keys or values, ``[1, heads, tokens, width]``.

    ``also``: another that holds the same values, for which the same memory stands.
    """

    name: str
    heads: int
    width: int
    dtype: CacheType
    also: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that its memory is bound as."""
        return (self.name, self.also) if self.also else (self.name,)


def pasts_of(session: Any, *, in_one: bool = False) -> list[Past]:
    """Plain values: onnxruntime's own descriptions would keep its session alive.

    ``in_one``: where values are their keys (MLA), one memory stands for both.
    """
    pasts = [
        Past(given.name, given.shape[1], given.shape[3], CACHE_TYPES[given.type])
        for given in session.get_inputs()
        if given.name.startswith(PAST)
    ]
    if not in_one or VALUES_ARE_KEYS not in session.get_modelmeta().custom_metadata_map:
        return pasts
    return [
        past._replace(also=past.name.removesuffix(KEY) + VALUE)
        for past in pasts
        if past.name.endswith(KEY)
    ]


class Caches(ABC):
    """All caches of a session, which grow together."""

    def __init__(self, binding: Any, pasts: Sequence[Past]) -> None:
        self._binding = binding
        self._pasts = pasts
        self.room = 0
        """Tokens that there is memory for."""

    def __len__(self) -> int:
        return sum(len(past.names) for past in self._pasts)

    @property
    def token_bytes(self) -> int:
        """Of one token in all caches."""
        return sum(past.heads * past.width * np.dtype(past.dtype).itemsize for past in self._pasts)

    @property
    def nbytes(self) -> int:
        return self.room * self.token_bytes

    def reserve(self, total: int, used: int, limit: int) -> None:
        """Have room for ``total`` tokens, of which the first ``used`` stay as they are.

        Raises ``GenerationError`` when there is no memory; the caches are then as they were.
        """
        if total > self.room:
            room = self._fitting(next_room(self.room, total, limit), total)
            self._grow([(1, past.heads, room, past.width) for past in self._pasts], used)
            self.room = room

    def _fitting(self, room: int, total: int) -> int:
        """``room``, or no more than ``total`` where that does not fit."""
        return room

    @abstractmethod
    def _grow(self, shapes: Sequence[tuple[int, ...]], used: int) -> None:
        """Take memory of these shapes and bind it."""

    @abstractmethod
    def read(self, used: int) -> tuple[Cache, ...]:
        """Copies of the first ``used`` tokens of each."""

    @abstractmethod
    def write(self, copies: Sequence[Cache]) -> None:
        """Put such copies back at the beginning."""

    def takes(self, copies: Sequence[Cache]) -> bool:
        """Whether ``copies`` are of the same model."""
        kinds = [(copy.dtype, copy.shape[1::2]) for copy in copies]
        ours = [(np.dtype(past.dtype), (past.heads, past.width)) for past in self._pasts]
        return kinds == ours


class HostCaches(Caches):
    """In the computer's memory."""

    def __init__(self, binding: Any, pasts: Sequence[Past]) -> None:
        super().__init__(binding, pasts)
        self._arrays: list[Cache] = []

    def _fitting(self, room: int, total: int) -> int:
        # Linux promises memory that it has not, and ends programs that believe it.
        free = free_memory_bytes()
        room = room if room * self.token_bytes <= free else total
        smaller = "a smaller --context, or convert again with --kv-cache int8"
        limits.check_kv_memory(room * self.token_bytes, free, smaller)
        return room

    def _grow(self, shapes: Sequence[tuple[int, ...]], used: int) -> None:
        grown = allocate(shapes, [past.dtype for past in self._pasts])
        for past, array, old in zip_longest(self._pasts, grown, self._arrays):
            if old is not None:
                array[:, :, :used] = old[:, :, :used]
            where = (array.dtype.type, array.shape, array.ctypes.data)
            for name in past.names:
                self._binding.bind_input(name, "cpu", 0, *where)
                self._binding.bind_output(name.replace(PAST, PRESENT), "cpu", 0, *where)
        self._arrays = grown

    def read(self, used: int) -> tuple[Cache, ...]:
        return tuple(array[:, :, :used].copy() for array in self._arrays)

    def write(self, copies: Sequence[Cache]) -> None:
        for array, copy in zip(self._arrays, copies, strict=True):
            array[:, :, : copy.shape[2]] = copy


class DeviceCaches(Caches):
    """In the memory of ``device``, as onnxruntime names it."""

    def __init__(self, binding: Any, pasts: Sequence[Past], device: str) -> None:
        super().__init__(binding, pasts)
        self._device = device
        self._values: list[Any] = []

    def _grow(self, shapes: Sequence[tuple[int, ...]], used: int) -> None:
        from onnxruntime import OrtValue

        old = self.read(used) if self.room else ()
        values = [
            OrtValue.ortvalue_from_shape_and_type(shape, past.dtype, self._device, 0)
            for past, shape in zip(self._pasts, shapes, strict=True)
        ]
        for past, value in zip(self._pasts, values, strict=True):
            self._binding.bind_ortvalue_input(past.name, value)
            self._binding.bind_ortvalue_output(past.name.replace(PAST, PRESENT), value)
        self._values = values
        self._fill(old, shapes)

    def read(self, used: int) -> tuple[Cache, ...]:
        return tuple(value.numpy()[:, :, :used].copy() for value in self._values)

    def write(self, copies: Sequence[Cache]) -> None:
        self._fill(copies, [tuple(value.shape()) for value in self._values])

    def _fill(self, copies: Sequence[Cache], shapes: Sequence[tuple[int, ...]]) -> None:
        """Whole arrays are handed over, for onnxruntime copies no part of one."""
        for past, value, shape, copy in zip_longest(self._pasts, self._values, shapes, copies):
            whole = np.zeros(shape, past.dtype)
            if copy is not None:
                whole[:, :, : copy.shape[2]] = copy
            value.update_inplace(whole)
