"""On which base an adapter was trained, full or dequantized, and the base that it is merged into.

A QLoRA adapter makes up for the rounding of the base that it was trained on: merged into the
full-precision weights instead, what it learned to take back was never there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edgellm.errors import AdapterError, UsageError
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.rounded_base import METHODS, dequantized_base
from edgellm.lora.base.training_evidence import (
    FULL,
    Evidence,
    evidence,
    is_unsloth_dynamic,
    unread_settings,
)
from edgellm.recipe import DEQUANTIZED
from edgellm.source.model import ModelSource
from edgellm.source.quantized import stored_as

CHOICES = (FULL, DEQUANTIZED, *METHODS)
"""What ``--merge-base`` takes."""


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """``method``: how the base was rounded (a row of ``rounded_base.METHODS``, or the types in
    which the base given is stored); empty for ``full``.

    ``stored``: the base given holds it already. ``reason`` is a sentence that says what is merged
    into and why; ``notes`` are what contradicts it or keeps it from being exact. ``skipped`` as
    ``dequantized_base`` takes it.
    """

    kind: Literal["full", "dequantized"]
    method: str
    reason: str
    stored: bool = False
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] | None = field(default=None)

    def of(self, source: ModelSource) -> ModelSource:
        """``source`` as this base; itself where nothing is to be rounded."""
        if self.kind == FULL or self.stored:
            return source
        return dequantized_base(source, self.method, self.skipped)


def training_base(adapter: Adapter, source: ModelSource, asked: str | None = None) -> TrainingBase:
    """The base that ``adapter`` was trained on, as far as can be told; reads texts beside it.

    In order: what was ``asked`` for, the base given where it is quantized itself, what comes with
    the adapter. Raises ``UsageError`` for an ``asked`` base that cannot be had, ``AdapterError``
    where the adapter was trained on one that cannot be made from ``source``.
    """
    check_asked(asked)
    said = evidence(adapter)
    types = stored_as(source.tensors)
    if types:
        return _stored_base(source, types, said, asked)
    if asked == FULL or asked in METHODS:
        return _asked_base(asked, said)
    if not said:
        return _unknown_base(adapter, asked)
    chosen = _most_exact(said)
    notes = tuple(
        f"{other.where} says {other.says}, {chosen.where} {chosen.says}: the latter was followed"
        for other in said
        if other.family != chosen.family
    )
    if chosen.method == FULL:
        if asked == DEQUANTIZED:
            return _unknown_base(adapter, asked)
        why = f"{chosen.where} says {chosen.says}"
        return TrainingBase(
            "full", "", f"merged into the full-precision weights: {why}", False, notes
        )
    if chosen.method not in METHODS:
        raise AdapterError(
            f"{adapter.name} was trained on a base that {chosen.method} quantized ({chosen.where} "
            f"says {chosen.says}), which cannot be made from {source.name}: give that base itself, "
            "or merge into these weights all the same with --merge-base full"
        )
    if is_unsloth_dynamic(adapter.base_name):
        notes += (
            f"{adapter.base_name} leaves some layers unrounded, and which ones only it says: give "
            "it as the base for exactly what the adapter was trained on",
        )
    return TrainingBase(
        "dequantized",
        chosen.method,
        f"merged into dequantized {label(chosen.method)}: {chosen.where} says {chosen.says}",
        notes=notes,
        skipped=chosen.skipped,
    )


def common_base(
    adapters: Sequence[Adapter], source: ModelSource, asked: str | None = None
) -> TrainingBase:
    """The one base of all ``adapters``. Raises ``UsageError`` where they were trained on several.

    Otherwise as ``training_base``.
    """
    bases = [training_base(adapter, source, asked) for adapter in adapters]
    first = bases[0]
    for adapter, base in zip(adapters, bases, strict=True):
        if (base.kind, base.method) != (first.kind, first.method):
            raise UsageError(
                f"{adapters[0].name} would be {first.reason}, and {adapter.name} {base.reason}: "
                f"choose one base for both by --merge-base ({', '.join(CHOICES)})"
            )
    notes = dict.fromkeys(note for base in bases for note in base.notes)
    return replace(first, notes=tuple(notes))


def check_asked(asked: str | None) -> None:
    """Raise ``UsageError`` for a ``--merge-base`` that does not exist."""
    if asked is not None and asked not in CHOICES:
        raise UsageError(f"no --merge-base {asked!r}: choose {', '.join(CHOICES)}")


def label(method: str) -> str:
    """``method`` in words."""
    if method.endswith("-dq"):
        return f"{method.removesuffix('-dq')} (double quantization)"
    return "int8 (LLM.int8())" if method == "int8" else method


def _stored_base(
    source: ModelSource, types: Sequence[str], said: Sequence[Evidence], asked: str | None
) -> TrainingBase:
    """The base given is quantized: there is nothing else to merge into."""
    stored = " and ".join(types)
    if asked not in (None, DEQUANTIZED, stored):
        raise UsageError(
            f"--merge-base {asked}: {source.name} is stored as {stored}, and its weights before "
            "that are not in it: give the full-precision model as the base, or leave the option out"
        )
    said_so = [item for item in said if item.family == _family(types)]
    others = [item for item in said if item.family != _family(types)]
    why = f"{source.name} is stored so"
    if said_so:
        why += f", and {said_so[0].where} says {said_so[0].says}"
    notes = tuple(
        f"{item.where} says {item.says}, and {source.name} is stored as {stored}: the adapter was "
        "trained on another form of the base; give that one for an exact merge"
        for item in others
    )
    names = " and ".join(label(name) for name in types)
    reason = f"merged into dequantized {names}: {why}"
    return TrainingBase("dequantized", stored, reason, stored=True, notes=notes)


def _family(types: Sequence[str]) -> str:
    """``Evidence.family`` of a base stored as ``types``."""
    main = types[0]
    if main.startswith(("nf4", "fp4")):
        return "4bit"
    return main.split("-")[0]


def _asked_base(asked: str, said: Sequence[Evidence]) -> TrainingBase:
    family = Evidence(asked, "", "").family
    notes = tuple(
        f"{item.where} says {item.says}, and --merge-base {asked} was asked for"
        for item in said
        if item.family != family
    )
    skipped = next((item.skipped for item in said if item.family == family), None)
    if asked == FULL:
        reason = "merged into the full-precision weights: --merge-base full"
        return TrainingBase("full", "", reason, notes=notes)
    reason = f"merged into dequantized {label(asked)}: --merge-base {asked}"
    return TrainingBase("dequantized", asked, reason, notes=notes, skipped=skipped)


def _unknown_base(adapter: Adapter, asked: str | None) -> TrainingBase:
    unread = unread_settings(adapter)
    if asked == DEQUANTIZED:
        raise UsageError(
            f"--merge-base dequantized: nothing that comes with {adapter.name} says how its base "
            f"was quantized{unread}: name it, --merge-base {' or '.join(METHODS)}"
        )
    return TrainingBase(
        "full",
        "",
        "merged into the full-precision weights: nothing that comes with the adapter says that its "
        f"base was quantized{unread}",
    )


def _most_exact(said: Sequence[Evidence]) -> Evidence:
    """The first, or of the same family the first that spells the settings out."""
    first = said[0]
    alike = [item for item in said if item.family == first.family]
    return next((item for item in alike if item.exact), first)
