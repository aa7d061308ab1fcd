"""Adapters put on a base by the Hugging Face names of its weights: the one place that knows which
weight an adapter means.

A base whose family is known gives its weights with their roles and orientations; any other gives
what its checkpoint holds. Nothing is loaded here: what comes back loads slab by slab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Binding, Combination
from edgellm.lora.combine.combined import combined
from edgellm.lora.edit import Edit, Target
from edgellm.lora.experts import expert_edits
from edgellm.lora.kinds import bind_of
from edgellm.source.matching import equal, listed
from edgellm.tensors import Array, TensorRef, transposed

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
        if key in self.weights or (self.tied and key == self.head):
            return key
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
    replaced = _replacements(base, adapters)
    names = list(dict.fromkeys((*replaced, *(name for edits in bindings for name in edits))))
    changed = {}
    for name in names:
        weight = base.weight(name)
        found = [edits.get(name) for edits in bindings]
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
    return _with_tables_settled(base, adapters, changed, bindings)


def edits_of(base: NamedWeights, adapter: Adapter) -> dict[str, Binding]:
    """What ``adapter`` does to which weight of ``base``, by the base's names.

    Raises ``AdapterError`` for keys that match no weight and for shapes that do not fit.
    """
    bind = bind_of(adapter.kind)
    found: dict[str, Binding] = {}
    lost: list[str] = []
    twice: list[str] = []
    for key, parts in adapter.parts.items():
        name = base.name_of(key)
        if name is not None:
            weight = base.weight(name)
            # Settings of single weights (rank_pattern) are looked up by the adapter's own name.
            target = replace(weight.target, name=key, base=weight.ref)
            edits: Mapping[str, Edit] = {name: bind(target, parts, adapter.config)}
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


def _replacements(base: NamedWeights, adapters: Sequence[Adapter]) -> dict[str, TensorRef]:
    """Whole tensors by the base's names, each given by one adapter."""
    found: dict[str, TensorRef] = {}
    givers: dict[str, str] = {}
    for adapter in adapters:
        for key, ref in adapter.replaced.items():
            name = base.name_of(key)
            assert name is not None  # edits_of has looked
            if name in found:
                raise AdapterError(
                    f"{givers[name]} and {adapter.name} both replace {name} whole, and two of them "
                    "have no sum: merge them one after the other, or only one of them"
                )
            if adapter.weight != 1.0:
                raise AdapterError(
                    f"{adapter.name} replaces {name} whole (modules_to_save), which cannot be "
                    f"done {adapter.weight:g} times: give it without a weight"
                )
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
            found[name], givers[name] = ref, adapter.name
    return found


def _with_tables_settled(
    base: NamedWeights,
    adapters: Sequence[Adapter],
    changed: dict[str, ChangedWeight],
    bindings: tuple[Mapping[str, Binding], ...],
) -> MergedWeights:
    """Head and embedding, which the base ties, as the adapters leave them.

    While training, PEFT puts a change of one of them on that side alone, so merging it into the
    shared table would change the other side too, which nobody trained. ``ensure_weight_tying`` asks
    for just that.
    """
    assert base.embedding is not None
    assert base.head is not None
    embedding, head = changed.get(base.embedding), changed.get(base.head)
    if embedding is None and head is None:
        return MergedWeights(changed, bindings, tied=True)
    asked = [adapter for adapter in adapters if adapter.config.get("ensure_weight_tying")]
    one = embedding or head
    assert one is not None
    if embedding is None or head is None:
        if asked or one.start.shape != base.weights[base.embedding].ref.shape:
            target = base.weights[base.embedding].target
            others = {name: each for name, each in changed.items() if name != base.head}
            both = {**others, base.embedding: replace(one, target=target)}
            note = f"{base.head} and {base.embedding} stay one table, as the adapter asks"
            return MergedWeights(both, bindings, tied=True, notes=(note,))
    elif embedding.edit is None and head.edit is None and equal(embedding.start, head.start):
        others = {name: each for name, each in changed.items() if name != base.head}
        return MergedWeights(others, bindings, tied=True)
    weight = base.weight(base.head)
    settled = {**changed, base.head: head or ChangedWeight(weight.target, weight.ref, None)}
    side = base.head if embedding is None else base.embedding
    trained = "were trained apart" if embedding and head else f"only {side} was trained"
    note = f"{base.head} and {base.embedding} were one table and are two now: {trained}"
    return MergedWeights(settled, bindings, tied=False, notes=(note,))


def _nothing_matched(base: NamedWeights, adapter: Adapter, lost: list[str]) -> str:
    total = len(adapter.parts) + len(adapter.replaced)
    trained_on = f" ({adapter.base_name})" if adapter.base_name else ""
    ends = Counter(key.rsplit(".", 2)[-2] for key in lost if key.count(".") > 1)
    which = f", by module: {', '.join(f'{n} {end}' for end, n in ends.most_common(4))}"
    return (
        f"{adapter.name}: {len(lost)} of the {total} weights that it changes are not in "
        f"{base.where}: {listed(lost)}{which if len(lost) > 1 and ends else ''}. It was trained on "
        f"another model: give the base that it was trained on{trained_on}"
    )
