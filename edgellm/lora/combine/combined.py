"""One edit in place of several: built without reading a tensor, computed when rows are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from edgellm.errors import AdapterError, UsageError
from edgellm.lora.combine.check import method_named
from edgellm.lora.combine.dare import Factor, Masked, Masks, RandomKept, SeededMasks
from edgellm.lora.combine.methods import METHODS, Method
from edgellm.lora.combine.pruning import LargestKept, Pruning
from edgellm.lora.combine.rows import Task, merged_rows
from edgellm.lora.combine.sums import Sum, Weighted, computed, concatenated
from edgellm.lora.combine.ties import Sign
from edgellm.lora.combine.truncation import LowRankSum, WholeMatrix
from edgellm.lora.edit import Additive, Delta, Edit, LowRank, Target
from edgellm.lora.kinds.ia3 import Scaling, weighted
from edgellm.lora.kinds.multiplying import Multiplying
from edgellm.tensors import Array, LoadRows, TensorRef

if TYPE_CHECKING:
    from edgellm.lora.binding import Combination

FACTOR_NAMES: dict[Factor, str] = {"a": "lora_A", "b": "lora_B", "delta": "the change"}

TURNED_KINDS = ("embedding", "positions")
"""Tables of rows: what PEFT calls A of them lies in ``LowRank.b``, turned round."""


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's change of the weight at hand. ``adapter`` counts from 0, ``name`` is shown."""

    adapter: int
    name: str
    edit: Edit
    weight: float


def combined(
    edits: Sequence[Edit | None],
    weights: Sequence[float],
    combination: Combination,
    target: Target,
    *,
    names: Sequence[str] = (),
    masks: Masks | None = None,
) -> Edit:
    """All ``edits`` of the weight ``target`` as one, to be applied at weight 1.

    ``edits`` and ``weights`` have one entry an adapter, in order; None where an adapter leaves the
    weight alone, which then adds nothing. ``names`` of the adapters are for messages. ``masks``:
    where random masks come from, by default ``combination.seed``. Expects ``check`` to have passed,
    and ``settled`` to have given the rank.

    Nothing is read until rows are asked for. What comes of LoRA is LoRA again (``LowRank``), with
    factors that load by rows. Raises ``AdapterError`` where the method cannot take such adapters.
    """
    method = method_named(combination.method)
    parts = [
        Part(number, names[number] if names else f"adapter {number + 1}", edit, weight)
        for number, (edit, weight) in enumerate(zip(edits, weights, strict=True))
        if edit is not None
    ]
    if not parts:
        raise ValueError(f"no adapter changes {target.name}")
    if len(edits) == 1 or (combination.method == "cat" and len(parts) == 1):
        return _alone(parts[0])
    if combination.method == "linear" and any(isinstance(part.edit, Scaling) for part in parts):
        return weighted(edits, weights, target.name)
    if len(target.shape) != 2 and combination.method != "cat":
        raise AdapterError(
            f"{combination.method} combines matrices, and {target.name} has shape "
            f"{list(target.shape)} (a bias, or a stack of experts): choose cat, the exact sum"
        )
    build = _Build(method, combination, target, parts, masks or SeededMasks(combination.seed))
    if method.of == "factors":
        return build.of_factors()
    return build.of_truncated_deltas() if method.truncate else build.of_deltas()


def _alone(part: Part) -> Edit:
    """The one edit at its weight."""
    if isinstance(part.edit, LowRank):
        return LowRank(part.edit.a, part.edit.b, part.edit.scale * part.weight)
    if _is_additive(part.edit):
        return Sum([cast(Delta, part.edit)], [part.weight])
    if isinstance(part.edit, Multiplying):
        part.edit.check(part.weight)
    return Weighted(part.edit, part.weight)


def _is_additive(edit: Edit) -> bool:
    return isinstance(edit, Additive)


@dataclass(frozen=True, slots=True)
class _Build:
    """What all methods need, and the edit that each makes of it."""

    method: Method
    combination: Combination
    target: Target
    parts: Sequence[Part]
    masks: Masks

    def of_deltas(self) -> Edit:
        """The exact sum."""
        deltas, weights = self._deltas(), self._weights()
        lora = _all_low_rank(deltas)
        return concatenated(lora, weights) if lora else Sum(deltas, weights)

    def of_factors(self) -> LowRank:
        """A and B each combined like a weight of its own.

        The square root of an adapter's weight and scale goes into both, the sign into A.
        """
        edits = self._of_one_rank()
        strengths = [part.weight * edit.scale for part, edit in zip(self.parts, edits, strict=True)]
        roots = [math.sqrt(abs(strength)) for strength in strengths]
        signed = [math.copysign(root, s) for root, s in zip(roots, strengths, strict=True)]
        turned = self.target.kind in TURNED_KINDS
        a = self._merged("a", [edit.a for edit in edits], roots if turned else signed)
        b = self._merged("b", [edit.b for edit in edits], signed if turned else roots)
        return LowRank(a, b, 1.0)

    def of_truncated_deltas(self) -> LowRank:
        """The changes combined whole, then cut to a rank."""
        deltas, weights = self._deltas(), self._weights()
        rank = min(self._rank(), *self.target.shape)
        lora = _all_low_rank(deltas)
        factors: LowRankSum | WholeMatrix
        if lora and self.method.prune is None:
            if sum(edit.rank for edit in lora) <= rank:
                return concatenated(lora, weights)
            factors = LowRankSum(lora, weights, rank)
        else:
            name, shape = self.target.name, self.target.shape
            changes = [computed(f"the change of {name}", shape, edit.delta) for edit in deltas]
            factors = WholeMatrix(self._merged("delta", changes, weights), rank)
        rows, columns = self.target.shape
        return LowRank(
            self._computed("lora_A", (rank, columns), factors.load_a),
            self._computed("lora_B", (rows, rank), factors.load_b),
            1.0,
        )

    def _merged(
        self, factor: Factor, refs: Sequence[TensorRef], weights: Sequence[float]
    ) -> TensorRef:
        """One tensor of each part, combined by rows."""
        tasks = [
            Task(ref, self._pruning(factor, part, ref), np.float32(weight))
            for part, ref, weight in zip(self.parts, refs, weights, strict=True)
        ]
        sign = cast(Sign, self.combination.sign) if self.method.elect else None

        def load_rows(start: int, stop: int) -> Array:
            return merged_rows(tasks, sign, start, stop)

        return self._computed(FACTOR_NAMES[factor], refs[0].shape, load_rows)

    def _pruning(self, factor: Factor, part: Part, ref: TensorRef) -> Pruning | None:
        density = self.combination.density
        if self.method.prune is None or density is None or density >= 1:
            return None
        if self.method.prune == "random":
            masked = Masked(part.adapter, self.target.name, factor, ref.columns)
            return RandomKept(self.masks, masked, density)
        count = int(density * ref.size)
        if not count:
            raise AdapterError(
                f"density {density:g} keeps none of the {ref.size} values of "
                f"{FACTOR_NAMES[factor]} of {part.name} for {self.target.name}: choose "
                f"{1.1 / ref.size:.2g} or more"
            )
        return LargestKept(ref, count)

    def _weights(self) -> list[float]:
        return [part.weight for part in self.parts]

    def _rank(self) -> int:
        """The rank that was asked for, else the largest of the parts."""
        if self.combination.rank is not None:
            return self.combination.rank
        for part in self.parts:
            if not part.edit.rank:
                raise UsageError(
                    f"{self.combination.method} cuts to the largest rank of the adapters, but "
                    f"{part.name} has none for {self.target.name}: say --combine-rank N, or "
                    "choose cat"
                )
        return max(part.edit.rank for part in self.parts)

    def _deltas(self) -> list[Delta]:
        other = next((part for part in self.parts if not _is_additive(part.edit)), None)
        if other is not None:
            scalings = all(isinstance(part.edit, Scaling) for part in self.parts)
            way_out = (
                "choose linear, which sums the scalings of IA3"
                if scalings
                else "merge it alone, then merge the others into the result"
            )
            raise AdapterError(
                f"{other.name} does not add to {self.target.name}: what it does depends on the "
                "weight (DoRA, IA3, OFT and trained tokens are such), so it has no sum with other "
                f"adapters: {way_out}"
            )
        return [cast(Delta, part.edit) for part in self.parts]

    def _of_one_rank(self) -> list[LowRank]:
        method, name = self.combination.method, self.target.name
        whole = f"{method}_svd" if f"{method}_svd" in METHODS else "svd"
        edits = _all_low_rank(self._deltas())
        if not edits:
            other = next(part for part in self.parts if not isinstance(part.edit, LowRank))
            raise AdapterError(
                f"{method} combines the factors A and B of LoRA, and {other.name} has others for "
                f"{name}: choose cat, the exact sum, or {whole}"
            )
        ranks = [edit.rank for edit in edits]
        if len(set(ranks)) > 1:
            raise AdapterError(
                f"{method} needs adapters of one rank, got {', '.join(map(str, ranks))} for "
                f"{name}: choose cat, the exact sum, or {whole}"
            )
        return edits

    def _computed(self, noun: str, shape: tuple[int, ...], load_rows: LoadRows) -> TensorRef:
        name = f"{noun} of {self.combination.method} for {self.target.name}"
        return computed(name, shape, load_rows)


def _all_low_rank(edits: Sequence[Edit]) -> list[LowRank]:
    """``edits`` where all are LoRA, else none."""
    found = [edit for edit in edits if isinstance(edit, LowRank)]
    return found if len(found) == len(edits) else []
