"""States of layers in a llama.cpp context, read and put back without keys and values."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.errors import GenerationError
from edgellm.runtimes.llamacpp_library import last_words


def bytes_of(buffer: npt.NDArray[np.uint8]) -> Any:
    """A pointer to the bytes of ``buffer``, which must outlive it."""
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class PartialStates:
    """The states of the one sequence of ``context``, as llama.cpp writes them down."""

    def __init__(self, library: Any, context: Any) -> None:
        self._library, self._context = library, context
        self._only = library.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

    @property
    def nbytes(self) -> int:
        """Bytes of the states as they are now."""
        return int(self._library.llama_state_seq_get_size_ext(self._context, 0, self._only))

    def read(self) -> npt.NDArray[np.uint8]:
        """A copy of all, ``[bytes]``."""
        state = np.empty(self.nbytes, np.uint8)
        written = self._library.llama_state_seq_get_data_ext(
            self._context, bytes_of(state), state.size, 0, self._only
        )
        if written != state.size:
            raise GenerationError(
                f"llama.cpp saved {written} of {state.size} bytes of its states: {last_words()}"
            )
        return state

    def write(self, state: npt.NDArray[np.uint8]) -> None:
        """Put back what ``read`` gave, of a shorter text too; keys and values stay."""
        whole = np.ascontiguousarray(state)
        taken = self._library.llama_state_seq_set_data_ext(
            self._context, bytes_of(whole), whole.size, 0, self._only
        )
        if taken != whole.size:
            raise GenerationError(f"llama.cpp did not take its states back: {last_words()}")
