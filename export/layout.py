"""What a container is to edgellm: a function from a described model to a ``Layout``.

A ``Layout`` knows every byte's place before a weight is read: small files whole, and each tensor
as arrays at offsets in a data file. ``convert`` streams weights into it and knows no container by
name; ``plan`` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgellm.quant.grid import Grid
from edgellm.quant.llm_int8 import is_beside
from edgellm.tensors import TensorRef

if TYPE_CHECKING:
    from edgellm.lora.adapter import Adapter
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource
    from edgellm.tokenization import Limit

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array on disk, filled by rows: row ``r`` starts at ``offset + r * row_bytes``.

    ``component`` says which part of the packed tensor it holds: ``data`` (codes or floats),
    ``scales``, ``zeros``, ``absmax``. ``rows_each``: how many rows of the tensor one row of the
    array holds, where a few are packed together. ``lines``: an array that is turned round has as
    many, and each holds its part of every row (1: rows follow one another).
    """

    name: str
    component: str
    file: str
    offset: int
    row_bytes: int
    rows: int
    rows_each: int = 1
    lines: int = 1

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.rows

    def places(self, start: int, content: Bytes) -> Iterator[tuple[int, Bytes]]:
        """Where the ``content`` of rows from ``start`` goes in the file, line by line.

        ``start`` must be a multiple of ``rows_each``.
        """
        line_bytes = self.nbytes // self.lines
        first = self.offset + start // self.rows_each * (self.row_bytes // self.lines)
        for number, line in enumerate(content.reshape(self.lines, -1)):
            yield first + number * line_bytes, line


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the artifact: source tensors stacked by rows, a grid, and where it is stored.

    ``packer`` names the row of ``export.packing.PACKERS`` that lays its rows out. ``note`` says
    what the user should know (a fallback type, a cap), or is empty. ``in_one_piece``: its rows
    cannot be rounded apart. ``keeps_codes``: no solver rounds it, the codes that its parts
    are stored as are taken over (``quant.stored``). ``experts``: how many parts are stacked that
    have an input each, so that no solver may see rows of two of them at once. ``in_turns``: of each
    expert there are two parts, whose rows are stored in turns.
    """

    name: str
    role: str
    parts: tuple[TensorRef, ...]
    grid: Grid
    packer: str
    arrays: tuple[StoredArray, ...]
    note: str = ""
    in_one_piece: bool = False
    keeps_codes: bool = False
    experts: int = 1
    in_turns: bool = False

    @property
    def rows_together(self) -> int:
        """How many rows are packed together: work is cut between such."""
        return max(array.rows_each for array in self.arrays)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]``, ``[n]`` for a vector, ``[experts, out, in]`` for a stack of experts."""
        if self.experts > 1:
            return (self.experts, self.rows // self.experts, self.columns)
        return self.parts[0].shape if len(self.parts) == 1 else (self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, slots=True)
class AdapterBeside:
    """An adapter that is written beside the model, unmerged, and the file that holds it."""

    adapter: Adapter
    file: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that a conversion will write.

    ``files``: small files, whole, by relative path. ``data_files``: path to size in bytes of the
    files that tensors are streamed into; where a path is in both, ``files`` holds its head.
    ``main_file`` is what a runtime opens. ``notes``: facts about the whole (a capped context).
    ``context_length``: what the artifact can be run with. ``tokenizer_limits``: what readers of the
    container are known to do differently with this tokenizer. ``adapters``: those that lie beside
    the model; their tensors are among ``tensors``.
    """

    container: str
    main_file: str
    files: dict[str, bytes]
    data_files: dict[str, int]
    tensors: tuple[OutputTensor, ...]
    context_length: int
    notes: tuple[str, ...] = ()
    tokenizer_limits: tuple[Limit, ...] = ()
    adapters: tuple[AdapterBeside, ...] = ()

    @property
    def model_tensors(self) -> tuple[OutputTensor, ...]:
        """The tensors of the model itself, without those of adapters beside it."""
        beside = {each.file for each in self.adapters}
        return tuple(each for each in self.tensors if each.arrays[0].file not in beside)

    @property
    def weights(self) -> int:
        """Number of the model's weights: columns kept as floats have codes too, and count once."""
        parts = (part for tensor in self.model_tensors for part in tensor.parts)
        return sum(part.size for part in parts if not is_beside(part.role))


@dataclass(frozen=True, slots=True)
class Container:
    """A format that models are written in.

    ``grids``: what ``--quant`` may name, default first in ``default_grid``. ``lay_out`` is pure: it
    reads headers, never weights, and raises ``UnsupportedTarget`` or ``UnknownGrid``. ``packages``:
    distributions whose version can change the bytes, which the manifest records. ``keep_apart``:
    the layout with adapters beside the model, where a runtime of the container applies them.
    ``default_layout``: of a container that has several for the codes of a grid (``--layout``), the
    one that is taken for this grid where none is named; None for grids that it leaves alone.
    """

    name: str
    grids: tuple[str, ...]
    default_grid: str
    lay_out: Callable[[ModelSource, Recipe], Layout]
    packages: tuple[str, ...] = ()
    keep_apart: Callable[[Layout, ModelSource, Sequence[Adapter]], Layout] | None = None
    default_layout: Callable[[str], str | None] | None = None
