"""The tensors of an artifact by role: read from where a layout placed them, and written back.

A weight comes in the network's own order of rows (``ModelSource``'s), whatever its container
stores: llama.cpp's pairs of q and k and a checkpoint's order are undone, stacked tensors parted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgellm.architectures.gguf_latent import source_role
from edgellm.architectures.gguf_rows import PAIRED_ROLES, halves_order
from edgellm.architectures.row_order import Order, sorts_columns
from edgellm.export.layout import Layout, OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.export.writer import StagedFolder
from edgellm.quant.grid import QTensor
from edgellm.quant.qtensor_rows import rows_of, stacked
from edgellm.source.model import ModelSource


class StoredModel:
    """The tensors of ``layout`` that are weights of ``source``'s network, in the folder ``path``.

    ``norms_offset``: whether norms are stored with the family's offset added, as they are used.
    """

    def __init__(self, layout: Layout, source: ModelSource, path: Path) -> None:
        self._source = source
        self._path = path
        self._pairs = layout.container == "gguf" and source.family.gguf_layout.interleaved_rope
        self.norms_offset = layout.container == "onnx" or (
            layout.container == "gguf" and source.family.gguf_layout.norm_plus_one
        )
        as_checkpoint = layout.container == "gguf" and source.family.gguf_layout.as_checkpoint
        in_checkpoint = as_checkpoint or layout.container in ("hf", "mlx")
        self._orders = {
            row.role: row.order
            for row in source.family.tensors(source.decoder)
            if in_checkpoint and row.order is not None
        }
        self._outputs = tuple(
            tensor
            for tensor in layout.model_tensors
            if all(source_role(part.role) in source.tensors for part in tensor.parts)
        )

    def roles_of(self, tensor: OutputTensor) -> tuple[str, ...]:
        """The roles that ``tensor`` holds."""
        return tuple(role for role, _ in parts_of(tensor))

    def under(
        self, prefix: str | tuple[str, ...]
    ) -> Iterator[tuple[OutputTensor, dict[str, QTensor]]]:
        """Tensors whose role begins with ``prefix``, and what each holds by role."""
        for tensor in self._outputs:
            if tensor.role.startswith(prefix):
                yield tensor, self.read(tensor)

    def read(self, tensor: OutputTensor) -> dict[str, QTensor]:
        """What ``tensor`` holds, by role. A vector is one row, or a row for each of its values."""
        components = {
            array.component: np.fromfile(
                self._path / array.file, np.uint8, array.nbytes, offset=array.offset
            ).reshape(array.rows, array.row_bytes)
            for array in tensor.arrays
        }
        whole = PACKERS[tensor.packer].unpack(components, tensor.grid, tensor.columns)
        return {
            role: self._in_order(rows_of(whole, rows), role, as_stored=False)
            for role, rows in parts_of(tensor)
        }

    def write(
        self, tensor: OutputTensor, weights: Mapping[str, QTensor], staged: StagedFolder
    ) -> None:
        """Lay ``weights``, by role as ``read`` gave them, out in the place of ``tensor``."""
        whole = stacked(
            [self._in_order(weights[role], role, as_stored=True) for role, _ in parts_of(tensor)]
        )
        packed = PACKERS[tensor.packer].pack(whole)
        for array in tensor.arrays:
            staged.write_at(array.file, array.offset, packed[array.component])

    def _in_order(self, weight: QTensor, role: str, *, as_stored: bool) -> QTensor:
        places = self.places(role)
        if places is None:
            return weight
        order = np.argsort(places) if as_stored else places
        if sorts_columns(self._orders.get(role)):  # rows of floats
            assert weight.packed is not None
            by_column = weight.packed.reshape(len(weight.packed), len(order), -1)
            return replace(weight, packed=by_column[:, order].reshape(weight.packed.shape))
        if role.endswith(".bias"):  # one row of floats
            assert weight.packed is not None
            values = weight.packed.reshape(len(order), -1)
            return replace(weight, packed=values[order].reshape(weight.packed.shape))
        return rows_of(weight, order)

    def places(self, role: str) -> Order | None:
        """For each row that the network takes, its place among the stored; None where it is its."""
        if role in self._orders:
            return self._orders[role].places()
        if not self._pairs or not role.endswith(PAIRED_ROLES):
            return None
        decoder = self._source.decoder
        heads = decoder.heads if ".attn_q." in role else decoder.kv_heads
        return halves_order(heads, decoder.head_dim)


def parts_of(tensor: OutputTensor) -> Iterator[tuple[str, slice]]:
    """The weight of the network and the rows of each part.

    A head cut from the embedding is a weight of its own. A container's tensor of one weight may be
    called otherwise than it: of Phi 3 the source has gate and up in one.
    """
    if len(tensor.parts) == 1:
        in_layer = tensor.role.startswith("blk.")
        yield tensor.parts[0].role if in_layer else tensor.role, slice(0, tensor.rows)
        return
    start = 0
    for place, part in enumerate(tensor.parts):
        if tensor.in_turns:
            first = start - place % 2 * (part.rows - 1)
            yield part.role, slice(first, first + 2 * part.rows - 1, 2)
        else:
            yield part.role, slice(start, start + part.rows)
        start += part.rows
