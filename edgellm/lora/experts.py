"""LoRA on stacked weights of experts (``target_parameters``), wherever a checkpoint keeps them.

In PEFT 0.21.2 (``ParamWrapper``, ``tuners/lora/layer.py``) one pair of factors serves all experts
of a parameter ``[experts, d1, d2]``: ``A`` is ``[rank * experts, in]``, some rows for each, and
``B`` is ``[out, rank * experts]``, whose column ``r * experts + e`` is rank ``r`` of expert ``e``.
Two parameters of one module are told apart by how deep they are nested (``base_layer``) alone.

transformers 5 stacks experts that many checkpoints keep apart (its ``conversion_mapping.py``):
``experts.gate_up_proj`` is then gate above up of every ``experts.N``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter, Parts
from edgellm.lora.edit import Additive, Edit, LowRank
from edgellm.lora.factors import kept
from edgellm.lora.reading.scaling import scale_of
from edgellm.tensors import Array, TensorRef, transposed

if TYPE_CHECKING:
    from edgellm.lora.named_weights import NamedWeights

NESTED = ".base_layer"

PARAMETERS = ("gate_up_proj", "down_proj")
"""In the order of their definition, which is the order of nesting: the first lies innermost."""

APART: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What the parts of a stacked parameter are called where experts are kept apart, top to bottom."""

INPUTS_FIRST = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
"""``model_type`` of models whose stacks are ``[experts, in, out]`` (``is_transposed`` in
transformers); asked only where a stack is square and its shape does not say."""


@dataclass(frozen=True)
class ExpertFactors:
    """One pair of factors cut into experts; ``a`` is ``[rank * experts, in]``."""

    a: TensorRef
    b: TensorRef
    experts: int
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    def expert(self, index: int, first: int = 0, out: int | None = None) -> LowRank:
        """The change of expert ``index``, of its outputs ``first:first + out``."""
        rank, out = self.rank, self.b.shape[0] if out is None else out

        def load_a(start: int, stop: int) -> Array:
            return self.a.load(index * rank + start, index * rank + stop)

        def load_b(start: int, stop: int) -> Array:
            return self._by_expert()[index, first + start : first + stop].copy()

        return LowRank(
            TensorRef(self.a.name, self.a.role, (rank, self.a.shape[1]), "f32", 0, load_a),
            TensorRef(self.b.name, self.b.role, (out, rank), "f32", 0, load_b),
            self.scale,
        )

    def _by_expert(self) -> Array:
        """``B`` as ``[experts, out, rank]``."""

        def turned() -> Array:
            stacked = self.b.load().reshape(self.b.shape[0], self.rank, self.experts)
            return np.ascontiguousarray(stacked.transpose(2, 0, 1))

        return kept.get(self, turned)


@dataclass(frozen=True)
class Stacked(Additive):
    """The change of a stack: rows are those of ``[experts * d1, d2]``, experts one by one."""

    each: tuple[LowRank, ...]
    rows_each: int

    @property
    def rank(self) -> int:
        return self.each[0].rank

    @property
    def scale(self) -> float:
        return self.each[0].scale

    def delta(self, start: int, stop: int) -> Array:
        pieces = []
        while start < stop:
            index, row = divmod(start, self.rows_each)
            count = min(self.rows_each - row, stop - start)
            pieces.append(self.each[index].delta(row, row + count))
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter of a module of experts is kept: a stack, or tensors of each expert.

    ``names`` are in the order of experts, and of each expert from top to bottom; ``out`` and
    ``into`` are what the adapter sees, for a stack as it is stored.
    """

    parameter: str
    names: tuple[str, ...]
    experts: int
    out: int
    into: int
    stacked: bool


def expert_edits(
    base: NamedWeights, key: str, parts: Parts, adapter: Adapter
) -> Mapping[str, Edit]:
    """What the parts ``key`` of an adapter do to which weights; empty where they mean no experts.

    Raises ``AdapterError`` for factors that fit none of the parameters that the adapter targets.
    """
    if adapter.kind != "lora" or "lora_A" not in parts or "lora_B" not in parts:
        return {}
    module = key.removesuffix(".weight")
    depth = module.count(NESTED)
    module = module.replace(NESTED, "")
    targets = adapter.config.get("target_parameters") or ()
    a, b = parts["lora_A"], parts["lora_B"]
    places = list(_places(base, module, targets))
    fitting = [place for place in places if _turned_round(base, place, a, b) is not None]
    if not fitting:
        if places:
            shapes = ", ".join(f"{p.parameter} {p.experts} x {p.out} x {p.into}" for p in places)
            raise AdapterError(
                f"{adapter.name}: the factors of {key} are {list(a.shape)} and {list(b.shape)}, "
                f"which fit none of {shapes} in {base.where}: it was trained on another model"
            )
        return {}
    # Alike in shape: the innermost wrapper belongs to the first parameter.
    place = fitting[max(0, len(fitting) - 1 - depth)]
    scale = scale_of(adapter.config, f"{module}.{place.parameter}", a.shape[0] // place.experts)
    factors = ExpertFactors(a, b, place.experts, scale)
    if not place.stacked:
        return dict(_apart(base, place, factors))
    each: Iterable[LowRank] = (factors.expert(index) for index in range(place.experts))
    if _turned_round(base, place, a, b):
        each = (LowRank(transposed(low.b), transposed(low.a), low.scale) for low in each)
    return {place.names[0]: Stacked(tuple(each), place.out)}


def _apart(
    base: NamedWeights, place: Place, factors: ExpertFactors
) -> Iterator[tuple[str, LowRank]]:
    first = expert = 0
    for name in place.names:
        out = base.weights[name].target.shape[0]
        yield name, factors.expert(expert, first, out)
        first += out
        if first == place.out:
            first, expert = 0, expert + 1


def _turned_round(base: NamedWeights, place: Place, a: TensorRef, b: TensorRef) -> bool | None:
    """Whether the stack is ``[experts, in, out]``; None where the factors do not fit it."""
    if a.shape[0] % place.experts or b.shape[1] != a.shape[0]:
        return None
    straight = (b.shape[0], a.shape[1]) == (place.out, place.into)
    turned = place.stacked and (a.shape[1], b.shape[0]) == (place.out, place.into)
    if straight and turned:
        return base.model_type in INPUTS_FIRST
    return turned if straight or turned else None


def _places(base: NamedWeights, module: str, targets: Iterable[str]) -> Iterator[Place]:
    """The parameters of ``module`` that ``targets`` name, in the order of their definition.

    ``module`` may also be a parameter's whole name.
    """
    for parameter in PARAMETERS:
        holder = module.removesuffix(f".{parameter}")
        if holder == module and not any(
            f".{module}.{parameter}".endswith(f".{target}") for target in targets
        ):
            continue
        if (name := base.name_of(f"{holder}.{parameter}")) is not None:
            shape = base.weights[name].target.shape
            if len(shape) == 3:
                yield Place(parameter, (name,), *shape, stacked=True)
            continue
        for parts in APART[parameter]:
            names = _names_apart(base, holder, parts)
            if names:
                shapes = [base.weights[name].target.shape for name in names]
                out = sum(shape[0] for shape in shapes[: len(parts)])
                experts = len(names) // len(parts)
                yield Place(parameter, names, experts, out, shapes[0][1], stacked=False)


def _names_apart(base: NamedWeights, holder: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """The weights ``holder.N.part.weight`` of all experts, whatever the block is called."""
    layer = re.match(r"(.*\.layers\.\d+\.)\w+\.experts$", holder)
    if layer is None:
        return ()
    names: list[str] = []
    for block in ("mlp", "block_sparse_moe", "feed_forward"):
        expert = 0
        while True:
            found = [
                base.name_of(f"{layer[1]}{block}.experts.{expert}.{part}.weight") for part in parts
            ]
            if not all(found):
                break
            names += [name for name in found if name is not None]
            expert += 1
        if names:
            break
    return tuple(names)
