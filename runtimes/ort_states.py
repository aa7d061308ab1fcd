"""States of layers in an ONNX session: what they were given last, read and written in one memory.

Not token by token as keys and values are; ``checkpoints`` tells how a session goes back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgellm.runtimes.ort_caches import CACHE_TYPES, CacheType

STATE = re.compile(r"past\.(\d+\.\w+)")
"""Inputs of the graph that hold the state of a layer, as onnxruntime-genai names them."""


class StateInput(NamedTuple):
    """An input of the graph that is a state, its output, and its shape for one sequence."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: CacheType

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def states_of(session: Any) -> list[StateInput]:
    """Plain values, as ``ort_caches.pasts_of`` has them."""
    found = []
    for given in session.get_inputs():
        name = STATE.fullmatch(given.name)
        if name:
            shape = (1, *given.shape[1:])
            kind = CACHE_TYPES[given.type]
            found.append(StateInput(given.name, f"present.{name[1]}", shape, kind))
    return found


class States:
    """All states of a session, zero at first, in the memory of ``device`` (onnxruntime's name)."""

    def __init__(self, binding: Any, inputs: Sequence[StateInput], device: str) -> None:
        from onnxruntime import OrtValue

        self._inputs = inputs
        self._values = []
        for each in inputs:
            value = OrtValue.ortvalue_from_numpy(np.zeros(each.shape, each.dtype), device, 0)
            binding.bind_ortvalue_input(each.past, value)
            binding.bind_ortvalue_output(each.present, value)
            self._values.append(value)

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(each.size * np.dtype(each.dtype).itemsize for each in self._inputs)

    def read(self) -> npt.NDArray[Any]:
        """A copy of all, one behind the other, ``[values]``."""
        return np.concatenate([value.numpy().reshape(-1) for value in self._values])

    def write(self, state: npt.NDArray[Any] | None) -> None:
        """Put back what ``read`` gave; None for zeros, as before the first token."""
        start = 0
        for each, value in zip(self._inputs, self._values, strict=True):
            part = np.zeros(each.size) if state is None else state[start : start + each.size]
            value.update_inplace(np.ascontiguousarray(part.reshape(each.shape), each.dtype))
            start += each.size

    def takes(self, state: npt.NDArray[Any]) -> bool:
        """Whether ``state`` may be another session's ``read`` of the same model."""
        sizes = sum(each.size for each in self._inputs)
        kinds = {np.dtype(each.dtype) for each in self._inputs}
        return state.shape[-1:] == (sizes,) and {state.dtype} == kinds
