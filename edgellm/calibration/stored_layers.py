"""Layers as they stand in the files of a conversion: the network that later layers will be run in.

Weights are read back by the inverse of the packer that wrote them, so that what later layers are
calibrated on is what a reader of the files will compute, and no copy of the codes is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgellm.architectures.gguf_latent import KEYS, VALUES, WHOLE, made_whole
from edgellm.calibration.blocks import LAYER_ROLE
from edgellm.export.layout import Layout, OutputTensor
from edgellm.quant import floats
from edgellm.quant.grid import QTensor
from edgellm.slabs import values_of
from edgellm.source.model import ModelSource
from edgellm.tensors import Array, TensorRef
from edgellm.tune.stored import StoredModel


def as_stored(source: ModelSource, layout: Layout, path: Path) -> ModelSource:
    """``source`` with the tensors of its layers as ``layout`` placed them in the folder ``path``.

    Each is read when it is loaded, which must be after it was written. The embedding, the head and
    the norm before it stay the source's. Loading raises ``TensorError`` and ``OSError`` as reading
    files does.
    """
    reader = _Reader(StoredModel(layout, source, path), layout, source)
    tensors = {
        role: reader.stored(ref) if LAYER_ROLE.match(role) else ref
        for role, ref in source.tensors.items()
    }
    return replace(source, tensors=tensors)


class _Reader:
    """Reads tensors by role; the one that was read last is kept, as its rows come slab by slab."""

    def __init__(self, model: StoredModel, layout: Layout, source: ModelSource) -> None:
        self._model, self._source = model, source
        self._offset = source.decoder.norm.offset and model.norms_offset
        self._outputs = {
            role: tensor
            for tensor in layout.model_tensors
            if LAYER_ROLE.match(tensor.role) or LAYER_ROLE.match(tensor.parts[0].role)
            for role in model.roles_of(tensor)
        }
        self._kept: tuple[OutputTensor | None, dict[str, Array]] = (None, {})

    def stored(self, ref: TensorRef) -> TensorRef:
        """``ref`` with the values that its output tensor holds, or the two that stand for it."""
        if ref.role not in self._outputs:
            # What is in tensors of its own for each row (norms of heads) stays the source's.
            return self._of_stacks(ref) if WHOLE in ref.role else ref
        output = self._outputs[ref.role]

        def load_rows(start: int, stop: int) -> Array:
            table = self._values(output)[ref.role].reshape(ref.rows, ref.columns)
            return table[start:stop].copy()

        return replace(ref, load_rows=load_rows, column_loader=None)

    def _of_stacks(self, ref: TensorRef) -> TensorRef:
        decoder = self._source.decoder
        assert decoder.latent is not None
        keys, values = (
            self.stored(self._outputs[ref.role.replace(WHOLE, part)].parts[0])
            for part in (KEYS, VALUES)
        )
        whole = made_whole(keys, values, decoder.heads, decoder.latent)
        return replace(ref, load_rows=whole.load_rows, column_loader=None)

    def _values(self, output: OutputTensor) -> dict[str, Array]:
        if self._kept[0] is not output:
            self._kept = (None, {})  # not two at once
            read = self._model.read(output).items()
            self._kept = (output, {role: self._float32(role, found) for role, found in read})
        return self._kept[1]

    def _float32(self, role: str, found: QTensor) -> Array:
        if found.grid.kind != "float":
            return values_of(found)
        assert found.packed is not None
        values = floats.decode(found.packed, found.grid.name)
        if self._offset and role.endswith("norm.weight"):
            values = values - 1  # the graph adds it again
        return values
