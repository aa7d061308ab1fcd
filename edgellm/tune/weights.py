"""Weights in torch: those of the artifact, of which some numbers are trained, and the source's.

What is trained starts as it is stored and is rounded to the type that it is stored in wherever it
is used (gradients pass the rounding as if it were not there), so that the network that is trained
is the one that will be read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgellm.architectures.decoder import Decoder
from edgellm.quant import floats, ggml
from edgellm.quant.dequantize import dequantize
from edgellm.quant.ggml_types import NAMED
from edgellm.quant.grid import Grid, QTensor
from edgellm.quant.levels import CODEBOOKS, VECTOR_CODEBOOKS, levels_of
from edgellm.tensors import Array, TensorRef
from edgellm.tune.settings import FIXED_GRIDS, Settings

STORED_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Trained(torch.nn.Module):
    """Numbers that are trained, in steps of ``unit``: ``base + unit * z``, as ``dtype`` holds it.

    ``z`` begins at zero, so the first values are exactly the stored ones.
    """

    def __init__(self, base: Array, unit: Array, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.unit = torch.from_numpy(base), torch.from_numpy(unit)
        self.dtype = dtype
        self.z = torch.nn.Parameter(torch.zeros_like(self.base))

    def forward(self) -> Tensor:
        value = self.base + self.unit * self.z
        if self.dtype == torch.float32:
            return value
        return value + (value.to(self.dtype).float() - value).detach()

    def set_values(self, values: Array) -> None:
        """Begin anew from ``values``, as ``values()`` gave them."""
        self.base = torch.from_numpy(values)
        with torch.no_grad():
            self.z.zero_()

    def values(self) -> Array:
        """What would be stored now."""
        with torch.no_grad():
            values: Array = self().numpy().astype(np.float32, copy=True)
        return values


class Matrix(torch.nn.Module):
    """A weight ``[out, in]``: codes that stay, and scales and minima by group that are trained.

    Floats, vector codebooks and grids whose scales are rounded as a whole (``FIXED_GRIDS``) stay as
    they are: their ``scales`` and ``mins`` are None.
    """

    def __init__(self, tensor: QTensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.scale: Trained | None = None
        self.minimum: Trained | None = None
        self.table: Tensor | None = None
        if tensor.codes is None or tensor.scales is None:
            self.levels = _finished(tensor)
            return
        if tensor.grid.name in FIXED_GRIDS:
            self.levels = torch.from_numpy(dequantize(tensor))
            return
        self.levels, self.table = _levels(tensor)
        stored = _scale_type(tensor.grid)
        supers = tensor.supers
        scales = tensor.scales if supers is None else supers.scales
        self.scale = Trained(scales, np.abs(scales), stored)
        if supers is not None:
            self.scale_codes = torch.from_numpy(supers.scale_codes.astype(np.float32))
            if supers.mins is not None and supers.min_codes is not None:
                self.minimum = Trained(supers.mins, np.abs(supers.mins), stored)
                self.min_codes = torch.from_numpy(supers.min_codes.astype(np.float32))
        elif tensor.mins is not None:
            # A step moves the minimum as far as it moves the top code's value by the scale.
            top = np.float32(2 ** int(tensor.grid.bits) - 1)
            self.minimum = Trained(tensor.mins, np.abs(scales) * top, stored)

    @property
    def rows(self) -> int:
        return self.levels.shape[0]

    def scales(self) -> Tensor | None:
        """By group, ``[rows, groups]``."""
        if self.scale is None:
            return None
        return (
            self.scale() if self.tensor.supers is None else _spread(self.scale(), self.scale_codes)
        )

    def mins(self) -> Tensor | None:
        """By group, ``[rows, groups]``, as they are added."""
        if self.minimum is None:
            return None
        return (
            self.minimum()
            if self.tensor.supers is None
            else -_spread(self.minimum(), self.min_codes)
        )

    def float_levels(self, ids: Tensor | None = None) -> Tensor:
        """The level of each code as float32, of all rows or of ``ids`` ``[n]``."""
        levels = self.levels if ids is None else self.levels[ids]
        if self.table is None:
            return levels.float()
        return self.table.index_select(0, levels.reshape(-1).int()).reshape(levels.shape)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` ``[...]``, each row ``[in]``."""
        flat = ids.reshape(-1)
        scales, mins = self.scales(), self.mins()
        found = dequantized(
            self.float_levels(flat),
            None if scales is None else scales[flat],
            None if mins is None else mins[flat],
        )
        return found.reshape(*ids.shape, -1)

    def forget_codes(self) -> None:
        """Keep the levels alone: half of the memory, and no more ``stored()``."""
        if self.scale is not None:
            self.tensor = replace(self.tensor, codes=None)

    def stored(self) -> QTensor:
        """The tensor with what was trained, ready to be packed."""
        if self.scale is None:
            return self.tensor
        scales = self.scale.values()
        mins = None if self.minimum is None else self.minimum.values()
        supers = self.tensor.supers
        if supers is None:
            return replace(self.tensor, scales=scales, mins=mins)
        with torch.no_grad():
            by_group, mins_by_group = self.scales(), self.mins()
        assert by_group is not None
        return replace(
            self.tensor,
            scales=by_group.numpy(),
            mins=None if mins_by_group is None else mins_by_group.numpy(),
            supers=replace(supers, scales=scales, mins=mins),
        )


class Vector(torch.nn.Module):
    """A norm's weight or a bias, trained whole. ``offset``: what is stored lacks this much."""

    def __init__(self, tensor: QTensor, offset: float, *, relative: bool) -> None:
        """``relative``: values move in proportion to their size, else to their mean size."""
        super().__init__()
        assert tensor.packed is not None
        self.tensor, self.offset = tensor, offset
        base = floats.decode(tensor.packed, tensor.grid.name).reshape(-1)
        size = np.abs(base + np.float32(offset))
        unit = size if relative else np.full_like(size, size.mean())
        self.value = Trained(base, unit, STORED_TYPES[tensor.grid.name])

    def forward(self) -> Tensor:
        value: Tensor = self.value()
        return value + self.offset if self.offset else value

    def stored(self) -> QTensor:
        """The vector with what was trained, ready to be packed."""
        packed = self.tensor.packed
        assert packed is not None
        values = self.value.values().reshape(len(packed), -1)
        return replace(self.tensor, packed=floats.encode(values, self.tensor.grid).packed)


class StudentWeights(torch.nn.Module):
    """Weights of an artifact by role, as ``torch_decoder.Weights``.

    ``products``: the type that products are taken in; what they give is float32 again.
    """

    def __init__(
        self, weights: Mapping[str, QTensor], decoder: Decoder, *, norms_offset: bool
    ) -> None:
        """``norms_offset``: the norms among them hold the family's offset already."""
        super().__init__()
        self.decoder = decoder
        self.products = torch.float32
        offset = float(decoder.norm.offset and not norms_offset)
        self.parts = torch.nn.ModuleDict()
        for role, tensor in weights.items():
            if is_vector(role):
                norm = role.endswith("norm.weight")
                part: torch.nn.Module = Vector(tensor, offset if norm else 0.0, relative=norm)
            else:
                part = Matrix(tensor)
            self.parts[_key(role)] = part

    def under(self, prefix: str) -> StudentWeights:
        """The same weights, but only those whose role begins with ``prefix``."""
        some = StudentWeights({}, self.decoder, norms_offset=True)
        some.parts.update(
            {key: part for key, part in self.parts.items() if key.startswith(_key(prefix))}
        )
        return some

    def matrix(self, role: str) -> Matrix:
        """The weight ``role``."""
        part = self.parts[_key(role)]
        assert isinstance(part, Matrix)
        return part

    def head(self) -> Matrix:
        """The output head: the embedding where the artifact has no other, tied or not."""
        has_own = _key("output.weight") in self.parts
        return self.matrix("output.weight" if has_own else "token_embd.weight")

    def product(self, role: str, x: Tensor) -> Tensor:
        matrix = self.matrix(f"{role}.weight")
        y = QuantizedProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), matrix.scales(), matrix.mins(), matrix, self.products
        )
        assert isinstance(y, Tensor)
        y = y.reshape(*x.shape[:-1], -1)
        bias = self.vector(f"{role}.bias")
        return y if bias is None else y + bias

    def vector(self, role: str) -> Tensor | None:
        key = _key(role)
        if key not in self.parts:
            return None
        found: Tensor = self.parts[key]()
        return found

    def rows(self, role: str, ids: Tensor) -> Tensor:
        return self.matrix(role).lookup(ids)

    def stored(self, role: str) -> QTensor:
        """What to pack for ``role``."""
        part = self.parts[_key(role)]
        assert isinstance(part, Matrix | Vector)
        return part.stored()

    def values(self) -> dict[str, Array]:
        """All numbers that are trained, as they would be stored now."""
        return {name: part.values() for name, part in self._trained()}

    def set_known(self, values: Mapping[str, Array]) -> bool:
        """Take from ``values`` what is trained here; whether there was any."""
        known = [(values[name], part) for name, part in self._trained() if name in values]
        for numbers, part in known:
            part.set_values(numbers)
        return bool(known)

    def _trained(self) -> Iterator[tuple[str, Trained]]:
        for name, part in self.named_modules():
            if isinstance(part, Trained):
                yield name, part

    def forget_codes(self) -> None:
        """Keep only what training needs, see ``Matrix.forget_codes``."""
        for part in self.parts.values():
            if isinstance(part, Matrix):
                part.forget_codes()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all that is trained."""
        return {name: z.detach().clone() for name, z in self.named_parameters()}

    def restore(self, snapshot: Mapping[str, Tensor] | None, share: float = 1.0) -> None:
        """Set all that is trained to ``share`` of ``snapshot``, or to what was stored."""
        with torch.no_grad():
            for name, z in self.named_parameters():
                z.zero_() if snapshot is None else torch.mul(snapshot[name], share, out=z)


def parameter_groups(weights: StudentWeights, settings: Settings) -> list[dict[str, Any]]:
    """What an optimizer is given: scales and minima at one rate, norms and biases at another."""
    scales = [
        z for part in weights.parts.values() if isinstance(part, Matrix) for z in part.parameters()
    ]
    vectors = [
        z for part in weights.parts.values() if isinstance(part, Vector) for z in part.parameters()
    ]
    return [
        {"params": params, "lr": rate}
        for params, rate in ((scales, settings.rate), (vectors, settings.norm_rate))
        if params
    ]


@dataclass(frozen=True)
class SourceWeights:
    """Weights of the source by role, as ``torch_decoder.Weights``: float32, nothing trained."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def load(cls, refs: Iterable[TensorRef], decoder: Decoder) -> SourceWeights:
        """The weights of ``refs``, read whole; raises what loading raises."""
        loaded: dict[str, Tensor] = {}
        for ref in refs:
            values = torch.from_numpy(ref.load().reshape(ref.shape))
            offset = decoder.norm.offset and ref.role.endswith("norm.weight")
            loaded[ref.role] = values + 1.0 if offset else values
        return cls(loaded)

    def product(self, role: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.tensors[f"{role}.weight"], self.vector(f"{role}.bias"))

    def vector(self, role: str) -> Tensor | None:
        return self.tensors.get(role)

    def rows(self, role: str, ids: Tensor) -> Tensor:
        return self.tensors[role][ids]


class QuantizedProduct(torch.autograd.Function):
    """``x @ weight.T``, multiplied in the type ``products``, that keeps neither the weight's values
    nor their gradient.

    Both are made again from the codes when gradients are asked for, one weight at a time.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        scales: Tensor | None,
        mins: Tensor | None,
        matrix: Matrix,
        products: torch.dtype,
    ) -> Tensor:
        x = x.to(products)
        ctx.save_for_backward(x, *(each for each in (scales, mins) if each is not None))
        ctx.matrix = matrix  # type: ignore[attr-defined]
        return (x @ dequantized(matrix.float_levels(), scales, mins).to(products).T).float()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        x, *rest = ctx.saved_tensors
        matrix: Matrix = ctx.matrix
        scales = rest[0] if rest else None
        mins = rest[1] if len(rest) > 1 else None
        levels, gradient = matrix.float_levels(), gradient.to(x.dtype)
        by_scale = by_min = None
        if scales is not None and ctx.needs_input_grad[1]:
            by_scale, by_min = group_gradients((gradient.T @ x).float(), levels, scales, mins)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (gradient @ dequantized(levels, scales, mins).to(x.dtype)).float()
        return by_x, by_scale, by_min, None, None


def dequantized(levels: Tensor, scales: Tensor | None, mins: Tensor | None) -> Tensor:
    """Values ``[rows, in]`` of float ``levels``, in the steps and rounding of every reader."""
    if scales is None:
        return levels
    groups = levels.reshape(*scales.shape, -1) * scales.unsqueeze(-1)
    if mins is not None:
        groups = groups + mins.unsqueeze(-1)
    return groups.reshape(levels.shape)


def group_gradients(
    gradient: Tensor, levels: Tensor, scales: Tensor, mins: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scales and minima ``[rows, groups]`` from that of the weight ``[rows, in]``."""
    by_group = gradient.reshape(*scales.shape, -1)
    by_scale = torch.einsum("rgi,rgi->rg", by_group, levels.reshape(by_group.shape))
    return by_scale, None if mins is None else by_group.sum(dim=-1)


def is_vector(role: str) -> bool:
    """Whether a role's tensor is added or multiplied value by value."""
    return role.endswith(("norm.weight", ".bias"))


def _key(role: str) -> str:
    """``role`` as a module's name, which may hold no dot."""
    return role.replace(".", "/")


def _spread(by_super: Tensor, codes: Tensor) -> Tensor:
    """Products of super-blocks' numbers ``[rows, super_blocks]`` and their groups' codes."""
    groups = codes.reshape(*by_super.shape, -1) * by_super.unsqueeze(-1)
    return groups.reshape(codes.shape)


def _scale_type(grid: Grid) -> torch.dtype:
    """What scales and minima are stored in: f16 in ggml's blocks."""
    return torch.float16 if grid.kind == "ggml" else STORED_TYPES[grid.scale_dtype]


def _levels(tensor: QTensor) -> tuple[Tensor, Tensor | None]:
    """Levels ``[rows, in]`` in as few bytes as hold them exactly, and the table they index if any.

    The levels of grids with integer zeros come less the zero.
    """
    assert tensor.codes is not None
    codes = torch.from_numpy(tensor.codes)
    levels = levels_of(tensor.grid)
    if (levels != np.rint(levels)).any():
        return codes, torch.from_numpy(levels.copy())
    if tensor.zeros is not None:
        zeros = torch.from_numpy(tensor.zeros).to(torch.int16)
        by_group = codes.reshape(*zeros.shape, -1).to(torch.int16) - zeros.unsqueeze(-1)
        small = by_group.to(torch.int8) if tensor.grid.bits < 8 else by_group
        return small.reshape(codes.shape), None
    if tensor.grid.name in CODEBOOKS:
        table = torch.from_numpy(levels.astype(np.int8))
        return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape), None
    if not levels[0]:
        return codes, None
    return (codes.to(torch.int16) + int(levels[0])).to(torch.int8), None


def _finished(tensor: QTensor) -> Tensor:
    """Values of a tensor of floats, in their own type, or of a vector codebook."""
    assert tensor.packed is not None
    if tensor.grid.name in VECTOR_CODEBOOKS or tensor.grid.kind == "ggml":
        return torch.from_numpy(ggml.dequantize(tensor.packed, NAMED[tensor.grid.name]))
    values = torch.from_numpy(floats.decode(tensor.packed, tensor.grid.name))
    return values.to(STORED_TYPES[tensor.grid.name])
