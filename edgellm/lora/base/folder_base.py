"""The base that adapters are merged into, where it is a checkpoint: its own weights, or rounded.

An adapter that was trained on a quantized base is merged into what that base computed with, as
``convert`` does (``lora.base.bases``); here by the names of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgellm.architectures import FAMILIES
from edgellm.errors import AdapterError, UsageError
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.bases import check_asked, common_base
from edgellm.lora.base.training_evidence import FULL, evidence
from edgellm.lora.binding import Binding
from edgellm.lora.check.doctor import changes_anything, untrained_said
from edgellm.lora.named_weights import ChangedWeight, MergedWeights, NamedWeights
from edgellm.source import open_source
from edgellm.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class FolderBase:
    """``weights`` are what is merged into; those named in ``rounded`` are not the checkpoint's.

    ``kind`` is ``full`` or ``dequantized`` with the method, ``reason`` a sentence that says why.
    """

    weights: NamedWeights
    rounded: frozenset[str]
    kind: str
    reason: str
    notes: tuple[str, ...] = ()

    def settled(self, merged: MergedWeights) -> MergedWeights:
        """``merged`` with every rounded weight among the changed: none is the checkpoint's own."""
        changed = dict(merged.changed)
        for name in self.rounded:
            weight = self.weights.weights[name]
            change = changed.get(name) or ChangedWeight(weight.target, weight.ref, None)
            changed[name] = replace(change, replaced=True)
        return replace(merged, changed=changed)


def folder_base(
    folder: Path,
    weights: NamedWeights,
    adapters: Sequence[Adapter],
    asked: str | None,
    *,
    ignore_config_keys: Collection[str] = (),
) -> FolderBase:
    """What ``adapters`` are merged into, as ``--merge-base`` asks or as they were trained.

    ``ignore_config_keys``: unknown keys of the base's config that the user vouches for.

    Raises ``UsageError`` for a base that cannot be had, ``AdapterError`` where the adapters were
    trained on one that cannot be made here.
    """
    check_asked(asked)
    rounds = asked not in (None, FULL)
    rounds |= any(item.method != FULL for adapter in adapters for item in evidence(adapter))
    if not rounds or weights.model_type not in FAMILIES:
        return _unrounded(weights, adapters, asked)
    source = open_source(str(folder), ignore_config_keys=ignore_config_keys)
    base = common_base(adapters, source, asked)
    rounded: dict[str, TensorRef] = {}
    if base.kind != FULL:
        before, after = source.tensors, base.of(source).tensors
        rounded = {
            name: after[weight.ref.role]
            for name, weight in weights.weights.items()
            if weight.ref.role in after and after[weight.ref.role] is not before[weight.ref.role]
        }
    merged_into = {
        name: replace(weight, ref=rounded.get(name, weight.ref))
        for name, weight in weights.weights.items()
    }
    return FolderBase(
        weights=replace(weights, weights=merged_into),
        rounded=frozenset(rounded),
        kind=f"{base.kind} {base.method}".strip(),
        reason=base.reason,
        notes=base.notes,
    )


def _unrounded(weights: NamedWeights, adapters: Sequence[Adapter], asked: str | None) -> FolderBase:
    """The checkpoint's own weights; raises where those of an unknown family should be rounded."""
    if asked not in (None, FULL):
        raise UsageError(
            f"--merge-base {asked}: {weights.where} is a {weights.model_type}, of which edgellm "
            "does not know which weights a quantized base rounds: choose full"
        )
    for adapter in adapters:
        said = [item for item in evidence(adapter) if item.method != FULL]
        if said and asked is None:
            raise AdapterError(
                f"{adapter.name} was trained on a quantized base ({said[0].where} says "
                f"{said[0].says}), and edgellm does not know which weights of a "
                f"{weights.model_type} that rounds: merge into the full-precision weights all the "
                "same with --merge-base full"
            )
    why = "--merge-base full" if asked else "nothing says that the adapter's base was quantized"
    return FolderBase(weights, frozenset(), FULL, f"merged into the full-precision weights: {why}")


def refuse_untrained(
    weights: NamedWeights,
    adapters: Sequence[Adapter],
    bindings: Sequence[Mapping[str, Binding]],
    *,
    allowed: bool,
) -> tuple[str, ...]:
    """Warnings of adapters that change nothing. Raises ``AdapterError`` unless they are allowed."""
    warnings = []
    for adapter, found in zip(adapters, bindings, strict=True):
        if adapter.replaced or any(
            changes_anything(binding.edit, weights.weight(name).ref)
            for name, binding in found.items()
        ):
            continue
        said = untrained_said(adapter.name, len(found), allowed=allowed)
        if not allowed:
            raise AdapterError(said)
        warnings.append(said)
    return tuple(warnings)
