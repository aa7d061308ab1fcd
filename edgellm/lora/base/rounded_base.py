"""The base as a QLoRA run saw it: full-precision weights rounded and read back, slab by slab.

Equal to loading the model with bitsandbytes 0.50 (its GPU kernels, as far as the order in which a
device sums the mean allows) and dequantizing it. Linear weights are rounded; embeddings, norms and
the output head stay, as in transformers (``get_keys_to_not_convert``).
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgellm.architectures.family import TensorRow
from edgellm.architectures.row_order import as_checkpoint_has, as_network_takes
from edgellm.quant import bnb_4bit, bnb_absmax, bnb_int8
from edgellm.quant.bnb_4bit import BLOCK
from edgellm.quant.floats import ENCODERS, rounded
from edgellm.source.model import ModelSource
from edgellm.tensors import SLAB_BYTES, Array, TensorRef, derived, rows_within

METHODS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
"""What bitsandbytes rounds to; ``-dq`` with double quantization."""

CHUNK_BLOCKS = 1 << 10
"""Blocks that are rounded at once: 256 KiB of float32."""

KEPT_SCALES = 8
"""Tensors whose scales are kept: as many as threads may be at work on at once."""


def dequantized_base(
    source: ModelSource, method: str, skipped: Sequence[str] | None = None
) -> ModelSource:
    """``source`` with its linear weights as ``method``, one of ``METHODS``, would leave them.

    Values are rounded to the dtype in which the source stores them, as ``dequantize_4bit`` rounds
    to that of the loaded model; those of ``int8`` stay in float32. Memory follows the slab; with
    double quantization each weight is read twice, for the mean of its scales. ``skipped`` is
    ``llm_int8_skip_modules`` where it was set: then it alone says what was left out, so that the
    head is rounded too unless named.
    """
    scales = _Scales(KEPT_SCALES)
    tensors = dict(source.tensors)
    for row in source.family.tensors(source.decoder):
        if row.role in tensors and _is_rounded(row, skipped):
            # Blocks of scales go on from row to row, as the checkpoint has them.
            stored = as_checkpoint_has(tensors[row.role], row)
            tensors[row.role] = as_network_takes(_rounded(stored, method, scales), row)
    return replace(source, tensors=tensors)


def _is_rounded(row: TensorRow, skipped: Sequence[str] | None) -> bool:
    """Whether transformers would (``should_convert_module``)."""
    if skipped is None:
        return row.kind == "linear"
    module = row.source.removesuffix(".weight")
    named = any(
        re.match(rf"(?:{re.escape(key)})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key)
        for key in skipped
    )
    return row.kind in ("linear", "head") and not named


def _rounded(ref: TensorRef, method: str, scales: _Scales) -> TensorRef:
    if method == "int8":
        return derived(ref, lambda rows: bnb_int8.dequantize(*bnb_int8.quantize(rows)))
    kind = method.removesuffix("-dq")
    blocks = Blocks(ref, kind, scales if method.endswith("-dq") else None)
    return replace(ref, load_rows=blocks.load_rows, column_loader=None)


@dataclass(frozen=True, slots=True)
class Blocks:
    """``ref`` in blocks of 4-bit codes that run over it row by row, straddling rows.

    ``scales`` keeps those that were rounded twice; None where they were not.
    """

    ref: TensorRef
    kind: str
    scales: _Scales | None

    def load_rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` rounded and read back, float32."""
        columns = self.ref.columns
        first, last = start * columns, stop * columns
        low, high = first // BLOCK, -(-last // BLOCK)
        values = self._values(low, high)
        scales = None
        if self.scales is not None:
            scales = self.scales.of(self.ref.role, self._scales_rounded_twice)[low:high]
        for at in range(0, high - low, CHUNK_BLOCKS):  # in place, while it lies in the cache
            part = values[at * BLOCK : (at + CHUNK_BLOCKS) * BLOCK]
            part[:] = self._read_back(part, None if scales is None else scales[at:])
        wanted = values[first - low * BLOCK : last - low * BLOCK]
        return np.ascontiguousarray(wanted.reshape(stop - start, columns))

    def _read_back(self, values: Array, scales: Array | None) -> Array:
        """Whole blocks of ``values`` rounded; ``scales`` take the place of their own from 0 on."""
        absmax = bnb_4bit.block_absmax(values)
        codes = bnb_4bit.quantize(values, absmax, self.kind)
        if scales is not None:
            absmax = scales[: len(absmax)]
        dtype = self.ref.dtype if self.ref.dtype in ENCODERS else "f32"
        return rounded(bnb_4bit.dequantize(codes, absmax, self.kind), dtype)

    def _values(self, low: int, high: int) -> Array:
        """All values of blocks ``low:high``, from whatever rows they lie in."""
        columns = self.ref.columns
        first, last = low * BLOCK, min(high * BLOCK, self.ref.size)
        row = first // columns
        values = self.ref.load(row, -(-last // columns)).reshape(-1)
        return values[first - row * columns : last - row * columns]

    def _scales_rounded_twice(self) -> Array:
        count = -(-self.ref.size // BLOCK)
        absmax = np.empty(count, np.float32)
        step = max(1, rows_within(SLAB_BYTES, BLOCK))
        for low in range(0, count, step):
            high = min(low + step, count)
            absmax[low:high] = bnb_4bit.block_absmax(self._values(low, high))
        twice = bnb_absmax.quantize(absmax)
        return bnb_absmax.dequantize(twice.codes, twice.absmax, twice.offset)


class _Scales:
    """The scales of the tensors used last, each computed once however many threads ask.

    All of a 7B model's would take 440 MB.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def of(self, role: str, compute: Callable[[], Array]) -> Array:
        with self._lock:
            entry = self._entries.setdefault(role, _Entry())
            self._entries.move_to_end(role)
            if len(self._entries) > self._kept:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.values is None:
                entry.values = compute()
            return entry.values


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: Array | None = None
