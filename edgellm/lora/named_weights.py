"""Adapters put on a base by the Hugging Face names of its weights: the one place that knows which
weight an adapter means.

A base whose family is known gives its weights with their roles and orientations; any other gives
what its checkpoint holds. Nothing is loaded here: what comes back loads slab by slab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import TypeVar

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter, Parts
from edgellm.lora.binding import Binding, Combination
from edgellm.lora.combine.combined import combined
from edgellm.lora.edit import Edit, LowRank, Target
from edgellm.lora.experts import expert_edits
from edgellm.lora.kinds import bind_of
from edgellm.lora.kinds.ia3 import scales_outputs
from edgellm.lora.kinds.trainable_tokens import TokenRows
from edgellm.source.matching import equal, listed
from edgellm.tensors import Array, TensorRef, transposed

Item = TypeVar("Item")

RENAMED = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))
"""Modules that transformers 5 calls otherwise than the checkpoints that it loads: Mixtral's, and
GPT-NeoX's head."""

TABLES = ("embedding", "head")
"""Kinds of weight with a row for each token, of which an adapter may bring more."""


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """A weight that an adapter may change. ``ref`` is canonical: ``[out, in]``, turned if need be.

    ``ref.role`` is its GGUF name where the family is known, else its own name.
    """

    target: Target
    ref: TensorRef


@dataclass(frozen=True)
class NamedWeights:
    """A base model by the names of its checkpoint.

    ``where`` names it in messages. ``embedding`` and ``head`` are the names of the two tables of
    token rows, None where unknown; a ``tied`` head has no weight of its own. A stack of experts has
    a ``Target`` of three dimensions and the rows of all of them, one below the other.
    """

    where: str
    weights: dict[str, NamedWeight]
    embedding: str | None
    head: str | None
    tied: bool
    model_type: str = ""

    def name_of(self, key: str) -> str | None:
        """The weight that an adapter calls ``key``; None for one that is not here.

        Models that were saved without their head, or inside a larger one, have shorter or longer
        names: the only weight that ends alike is meant then.
        """
        for spelling in (key, *(key.replace(new, old) for new, old in RENAMED)):
            if spelling in self.weights or (self.tied and spelling == self.head):
                return spelling
        alike = [
            name for name in self._names() if name.endswith(f".{key}") or key.endswith(f".{name}")
        ]
        return alike[0] if len(alike) == 1 else None

    def weight(self, name: str) -> NamedWeight:
        """The weight ``name``; of a tied head the embedding's values."""
        if name in self.weights or not self.tied:
            return self.weights[name]
        assert self.embedding is not None
        table = self.weights[self.embedding]
        return NamedWeight(replace(table.target, name=name, kind="head"), table.ref)

    def _names(self) -> Iterable[str]:
        yield from self.weights
        if self.tied and self.head is not None:
            yield self.head


@dataclass(frozen=True, slots=True)
class ChangedWeight:
    """A weight that is not the base's any more: ``start``, and what is done to its rows.

    ``start`` is the base's own weight, or the whole one that an adapter replaces it by
    (``replaced``). ``edit`` is that of all adapters together; None where there is none.
    """

    target: Target
    start: TensorRef
    edit: Edit | None
    replaced: bool = False

    def apply(self, rows: Array, start: int, stop: int) -> Array:
        """Rows ``start:stop`` after all changes; ``rows`` is theirs before, and may be used up."""
        return rows if self.edit is None else self.edit.apply(rows, start, stop, 1.0)

    def ref(self) -> TensorRef:
        """The changed weight, computed whenever rows of it are loaded."""

        def load_rows(start: int, stop: int) -> Array:
            return self.apply(self.start.load_rows(start, stop), start, stop)

        return replace(self.start, load_rows=load_rows, column_loader=None)


@dataclass(frozen=True)
class MergedWeights:
    """What the adapters make of a base; names, shapes and orientation as the base has them.

    ``changed`` holds the weights that differ, and a head that was tied before and is no longer.
    ``bindings``: what each adapter does to which weight, in the order of the adapters. ``tied``:
    whether head and embedding are still one table. ``notes`` are facts that the user should see.
    """

    changed: dict[str, ChangedWeight]
    bindings: tuple[Mapping[str, Binding], ...]
    tied: bool
    notes: tuple[str, ...] = ()


def merge_by_name(
    base: NamedWeights, adapters: Sequence[Adapter], combination: Combination
) -> MergedWeights:
    """The weights of ``base`` as if ``adapters`` had been trained into it.

    ``combination`` was settled and checked. Raises ``AdapterError`` for keys that match no weight,
    shapes that do not fit, and two adapters that replace the same weight.
    """
    strengths = [adapter.weight for adapter in adapters]
    adapter_names = [adapter.name for adapter in adapters]
    bindings = tuple(edits_of(base, adapter) for adapter in adapters)
    sides = [
        _on_both_sides(base, edits, partial(_meant_for_both, adapter))
        for adapter, edits in zip(adapters, bindings, strict=True)
    ]
    replaced = _replacements(base, adapters, sides)
    names = list(dict.fromkeys((*replaced, *(name for edits in sides for name in edits))))
    changed = {}
    for name in names:
        weight = base.weight(name)
        found = [edits.get(name) for edits in sides]
        edits = [None if binding is None else binding.edit for binding in found]
        edit = (
            combined(edits, strengths, combination, weight.target, names=adapter_names)
            if any(edits)
            else None
        )
        start = replaced.get(name, weight.ref)
        changed[name] = ChangedWeight(weight.target, start, edit, replaced=name in replaced)
    if not base.tied or base.embedding is None or base.head is None:
        return MergedWeights(changed, bindings, base.tied)
    return _with_tables_settled(base, sides, changed, bindings)


def edits_of(base: NamedWeights, adapter: Adapter) -> dict[str, Binding]:
    """What ``adapter`` does to which weight of ``base``, by the base's names.

    Raises ``AdapterError`` for keys that match no weight and for shapes that do not fit.
    """
    bind = bind_of(adapter.kind)
    found: dict[str, Binding] = {}
    lost: list[str] = []
    twice: list[str] = []
    replaced = _replaced_by(base, adapter)
    for key, parts in adapter.parts.items():
        name = base.name_of(key)
        if name is not None:
            weight = base.weight(name)
            # Settings of single weights (rank_pattern) are looked up by the adapter's own name.
            start = replaced.get(name, weight.ref)
            target = replace(weight.target, name=key, shape=start.shape, base=start)
            edits: Mapping[str, Edit] = {
                name: bind(target, parts, adapter.config),
                **_edit_of_bias(base, name, parts, adapter),
            }
        else:
            edits = expert_edits(base, key, parts, adapter)
        if not edits:
            lost.append(key)
        twice += [each for each in edits if each in found]
        found |= {each: Binding(edit, adapter.weight) for each, edit in edits.items()}
    lost += [key for key in adapter.replaced if base.name_of(key) is None]
    if lost:
        raise AdapterError(_nothing_matched(base, adapter, lost))
    if twice:
        raise AdapterError(
            f"{adapter.name} changes {listed(twice)} under two names: the adapter is damaged, "
            "or was put together by hand; save it again"
        )
    return found


def _edit_of_bias(base: NamedWeights, name: str, parts: Parts, adapter: Adapter) -> dict[str, Edit]:
    """What becomes of the bias beside weight ``name``, where ``parts`` scale a layer's outputs."""
    bias = name.removesuffix(".weight") + ".bias"
    if bias not in base.weights or not scales_outputs(parts):
        return {}
    return {bias: bind_of(adapter.kind)(base.weights[bias].target, parts, adapter.config)}


def _replacements(
    base: NamedWeights,
    adapters: Sequence[Adapter],
    edits: Sequence[Mapping[str, Binding]],
) -> dict[str, TensorRef]:
    """Whole tensors by the base's names; two adapters may give the same one.

    ``edits`` are what each adapter does besides: not to what another replaces.
    """
    found: dict[str, TensorRef] = {}
    givers: dict[str, str] = {}
    for adapter in adapters:
        for name, ref in _replaced_by(base, adapter).items():
            if adapter.weight != 1.0:
                if equal(ref, base.weight(name).ref):  # a table that was saved beside its change
                    continue
                raise AdapterError(
                    f"{adapter.name} replaces {name} whole (modules_to_save), which cannot be "
                    f"done {adapter.weight:g} times: give it without a weight"
                )
            if name in found and not equal(found[name], ref):
                raise AdapterError(
                    f"{givers[name]} and {adapter.name} both replace {name} whole, and two of them "
                    "have no sum: merge them one after the other, or only one of them"
                )
            found[name], givers[name] = ref, adapter.name
    for adapter, changes in zip(adapters, edits, strict=True):
        for name in changes:
            giver = givers.get(name, adapter.name)
            if giver != adapter.name and not equal(found[name], base.weight(name).ref):
                raise AdapterError(
                    f"{giver} replaces {name} whole and {adapter.name} changes what the base has "
                    "there, so there is no sum of both: merge them one after the other, or only "
                    "one of them"
                )
    return found


def _replaced_by(base: NamedWeights, adapter: Adapter) -> dict[str, TensorRef]:
    """The whole tensors of one adapter by the base's names, canonical; unknown names are left out.

    Raises ``AdapterError`` for shapes that do not fit; tables of token rows may have more or fewer.
    """
    found: dict[str, TensorRef] = {}
    for key, ref in adapter.replaced.items():
        name = base.name_of(key)
        if name is None:
            continue  # edits_of tells of it
        target = base.weight(name).target
        if target.transposed and len(ref.shape) == 2:
            ref = transposed(ref)
        more_rows = target.kind in TABLES and len(ref.shape) == len(target.shape) == 2
        fits = ref.shape[1:] == target.shape[1:] if more_rows else ref.shape == target.shape
        if not fits:
            raise AdapterError(
                f"{adapter.name} replaces {name} by a tensor of shape {list(ref.shape)}, and "
                f"{base.where} has {list(target.shape)}: it was trained on another model"
            )
        found[name] = ref
    whole = tuple(adapter.config.get("modules_to_save") or ())

    def both(name: str, _: TensorRef) -> bool:
        """A table that is not of ``modules_to_save`` is the shared one itself, saved again."""
        module = name.removesuffix(".weight")
        own = any(module == each or module.endswith(f".{each}") for each in whole)
        return not own or bool(adapter.config.get("ensure_weight_tying"))

    return _on_both_sides(base, found, both)


def _on_both_sides(
    base: NamedWeights, found: Mapping[str, Item], both: Callable[[str, Item], bool]
) -> dict[str, Item]:
    """``found`` with what it holds for one of a tied pair put on the other too, where ``both``."""
    sides = [name for name in (base.embedding, base.head) if base.tied and name is not None]
    present = [name for name in sides if name in found]
    if len(sides) == 2 and len(present) == 1 and both(present[0], found[present[0]]):
        return {**found, **dict.fromkeys(sides, found[present[0]])}
    return dict(found)


def _meant_for_both(adapter: Adapter, _: str, binding: Binding) -> bool:
    """Whether PEFT makes a change of one of a tied pair on both of its sides.

    It ties trained tokens by itself, anything else where ``ensure_weight_tying`` asks for it.
    """
    return bool(adapter.config.get("ensure_weight_tying")) or isinstance(binding.edit, TokenRows)


def _with_tables_settled(
    base: NamedWeights,
    sides: Sequence[Mapping[str, Binding]],
    changed: dict[str, ChangedWeight],
    bindings: tuple[Mapping[str, Binding], ...],
) -> MergedWeights:
    """Head and embedding, which the base ties, as the adapters leave them.

    While training, PEFT puts a change of one of them on that side alone, so merging it into the
    shared table would change the other side too, which nobody trained.
    """
    assert base.embedding is not None
    assert base.head is not None
    embedding, head = changed.get(base.embedding), changed.get(base.head)
    if embedding is None and head is None:
        return MergedWeights(changed, bindings, tied=True)
    if embedding is not None and head is not None and _one_table(embedding.start, head.start):
        pairs = [(edits.get(base.embedding), edits.get(base.head)) for edits in sides]
        if all(_same(*pair) for pair in pairs):
            one = {name: each for name, each in changed.items() if name != base.head}
            return MergedWeights(one, bindings, tied=True)
    weight = base.weight(base.head)
    settled = {**changed, base.head: head or ChangedWeight(weight.target, weight.ref, None)}
    side = base.head if embedding is None else base.embedding
    trained = "they were trained apart" if embedding and head else f"only {side} was trained"
    note = f"{base.head} and {base.embedding} were one table and are two now: {trained}"
    return MergedWeights(settled, bindings, tied=False, notes=(note,))


def _one_table(left: TensorRef, right: TensorRef) -> bool:
    return left.load_rows is right.load_rows or equal(left, right)


def _same(left: Binding | None, right: Binding | None) -> bool:
    """Whether two changes of one table are the same, as far as can be told from their factors."""
    if left is None or right is None:
        return left is right
    if left.edit is right.edit:
        return True
    ours, theirs = left.edit, right.edit
    if isinstance(ours, TokenRows) and isinstance(theirs, TokenRows):
        same_tokens = ours.indices.tolist() == theirs.indices.tolist()
        return same_tokens and equal(ours.values, theirs.values)
    return (
        isinstance(ours, LowRank)
        and isinstance(theirs, LowRank)
        and ours.scale == theirs.scale
        and equal(ours.a, theirs.a)
        and equal(ours.b, theirs.b)
    )


def _nothing_matched(base: NamedWeights, adapter: Adapter, lost: list[str]) -> str:
    total = len(adapter.parts) + len(adapter.replaced)
    trained_on = f" ({adapter.base_name})" if adapter.base_name else ""
    ends = Counter(key.rsplit(".", 2)[-2] for key in lost if key.count(".") > 1)
    which = f", by module: {', '.join(f'{n} {end}' for end, n in ends.most_common(4))}"
    near = get_close_matches(lost[0], base.weights, n=1)
    nearest = f" (nearest to the first there: {near[0]})" if near else ""
    return (
        f"{adapter.name}: {len(lost)} of the {total} weights that it changes are not in "
        f"{base.where}: {listed(lost)}{which if len(lost) > 1 and ends else ''}{nearest}. "
        f"It was trained on another model: give the base that it was trained on{trained_on}"
    )
