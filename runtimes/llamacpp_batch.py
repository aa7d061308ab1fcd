"""What llama.cpp is given at a time: tokens, their positions, and whose logits are wanted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np


class Batch:
    """A ``llama_batch`` over arrays that are made once and filled for each call."""

    def __init__(self, library: Any, room: int) -> None:
        self.room = room
        self._tokens = np.zeros(room, np.int32)
        self._positions = np.zeros(room, np.int32)
        self._outputs = np.zeros(room, np.int8)
        counts = np.ones(room, np.int32)
        sequence: Any = (ctypes.c_int32 * 1)(0)
        sequences = (ctypes.POINTER(ctypes.c_int32) * room)(*[sequence] * room)
        self._kept_alive = (counts, sequence, sequences)
        self._batch = library.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=sequences,
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, token_ids: Sequence[int], position: int, outputs: str) -> Any:
        """The batch of ``token_ids`` behind ``position`` tokens.

        ``outputs``: whose logits are wanted, ``all``, ``last`` or ``none``.
        """
        count = len(token_ids)
        self._batch.n_tokens = count
        if count == 1:
            self._tokens[0], self._positions[0] = token_ids[0], position
            self._outputs[0] = outputs != "none"
            return self._batch
        self._tokens[:count] = token_ids
        self._positions[:count] = np.arange(position, position + count)
        self._outputs[:count] = outputs == "all"
        self._outputs[count - 1] = outputs != "none"
        return self._batch
