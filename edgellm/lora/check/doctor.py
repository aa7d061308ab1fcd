"""What adapters would do to a base, found out before it is done: the report of ``adapter-check``.

``check_static`` reads the adapters alone and runs when every merge is planned. ``check`` reads the
base's weights too, slab by slab, and says how large the change of each of them is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.belonging import Belonging, belonging
from edgellm.lora.binding import Binding, Combination
from edgellm.lora.check.changes import TensorChange, measure, overall
from edgellm.lora.check.llamacpp_path import llamacpp_faults
from edgellm.lora.edit import Additive, Edit
from edgellm.lora.lineage import merged_twice, on_scaled
from edgellm.lora.merging import merged_source
from edgellm.lora.replication import replicated
from edgellm.progress import Progress, unwatched
from edgellm.source.matching import embedding_row, listed
from edgellm.source.model import ModelSource
from edgellm.tensors import SLAB_BYTES, TensorRef, rows_within

LARGE_CHANGE = 1.0
"""A change as large as the weight itself: no fine-tune, but a wrong scale or a wrong base."""

MUCH_VANISHING = 0.5
"""Share of changed values from which on a type is said to lose the adapter's work."""


class TargetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One weight that an adapter changes.

    ``scale`` is what the product of its factors is multiplied by, the adapter's weight included.
    ``trained``: whether anything changes at all. ``change``: None where no base weight was read.
    """

    role: str
    name: str
    rank: int
    scale: float
    trained: bool
    change: TensorChange | None = None


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter. ``relative``: the norm of all its changes over that of the weights."""

    name: str
    kind: str
    sha256: str
    weight: float
    belonging: Belonging
    targets: tuple[TargetFacts, ...]
    replaced: tuple[str, ...]
    relative: float | None = None
    llamacpp_faults: tuple[str, ...] = ()


class AdapterReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of adapters and their base.

    ``faults`` make a merge wrong or worthless, ``warnings`` may; ``notes`` are facts. ``together``:
    the changes of several adapters combined by ``method``; empty for one.
    """

    base: str
    method: str
    adapters: tuple[AdapterFacts, ...]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    together: tuple[TensorChange, ...] = ()
    together_relative: float | None = None


def check_static(merged: ModelSource, *, allow_untrained: bool = False) -> AdapterReport:
    """What can be said of the adapters in ``merged`` without a weight of the base.

    ``merged`` is of ``merged_source``, which refuses what matches nothing. Raises ``AdapterError``
    for an adapter that changes nothing, unless ``allow_untrained``.
    """
    report = report_static(merged, allow_untrained=allow_untrained)
    if report.faults:
        raise AdapterError(report.faults[0])
    return report


def report_static(merged: ModelSource, *, allow_untrained: bool = False) -> AdapterReport:
    """The report of ``check_static``, with what it would raise among the ``faults``."""
    merge = merged.merge
    assert merge is not None, "nothing was merged into this source"
    adapters = tuple(
        _facts(merge.base, merged, adapter, bindings)
        for adapter, bindings in zip(merge.adapters, merge.bindings, strict=True)
    )
    faults: list[str] = []
    warnings = [
        *merged_twice(merged),
        *on_scaled(merge.base.name, merge.adapters, merged.scaled_by),
    ]
    notes: list[str] = []
    said_already: list[str] = []
    for facts in adapters:
        untrained = [target.name for target in facts.targets if not target.trained]
        if untrained and len(untrained) == len(facts.targets) and not facts.replaced:
            said = untrained_said(facts.name, len(untrained), allowed=allow_untrained)
            (warnings if allow_untrained else faults).append(said)
            said_already.append(untrained_said(facts.name, len(untrained), allowed=True))
        elif untrained:
            notes.append(
                f"{facts.name}: {len(untrained)} of {len(facts.targets)} changes are zero: "
                f"{listed(untrained)}"
            )
    warnings += filter(None, (facts.belonging.warning(facts.name) for facts in adapters))
    said_already += warnings
    return AdapterReport(
        base=merge.base.name,
        method=merge.combination.method,
        adapters=adapters,
        faults=tuple(faults),
        warnings=tuple(warnings),
        # A source that was planned holds both among its notes already.
        notes=tuple(
            note for note in dict.fromkeys((*merged.notes, *notes)) if note not in said_already
        ),
    )


def check(
    merged: ModelSource,
    *,
    allow_untrained: bool = False,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> AdapterReport:
    """All that can be said without quantizing: ``report_static``, and the size of every change.

    Reads each changed weight of the base; memory is a few slabs. What is wrong stands in
    ``faults``; raises ``AdapterError`` where a merge makes NaN or Inf.
    """
    report = report_static(merged, allow_untrained=allow_untrained)
    merge = merged.merge
    assert merge is not None
    source, adapters = merge.base, merge.adapters
    found: list[AdapterFacts] = []
    for adapter, facts in zip(adapters, report.adapters, strict=True):
        # Alone and at its weight; of a single adapter that is the whole merge.
        alone = merged if len(adapters) == 1 else merged_source(source, [adapter], Combination())
        changes = _changes(source, alone, threads, progress)
        found.append(_with_changes(facts, changes))
    together: tuple[TensorChange, ...] = ()
    if len(adapters) > 1:
        together = tuple(_changes(source, merged, threads, progress).values())
    everything = together or tuple(
        target.change for facts in found for target in facts.targets if target.change
    )
    faults, warnings = _judged(everything)
    return msgspec.structs.replace(
        report,
        adapters=tuple(found),
        faults=(*report.faults, *faults),
        warnings=(*report.warnings, *warnings),
        together=together,
        together_relative=overall(together),
    )


def _facts(
    base: ModelSource, merged: ModelSource, adapter: Adapter, bindings: Mapping[str, Binding]
) -> AdapterFacts:
    targets = tuple(
        TargetFacts(
            role=role,
            name=_ref(merged, role).name,
            rank=binding.edit.rank,
            scale=binding.edit.scale * binding.weight,
            trained=changes_anything(binding.edit, _ref(merged, role)),
        )
        for role, binding in bindings.items()
    )
    return AdapterFacts(
        name=adapter.name,
        kind=adapter.kind,
        sha256=adapter.digest(),
        weight=adapter.weight,
        belonging=belonging(base, adapter),
        targets=targets,
        replaced=tuple(adapter.replaced),
        llamacpp_faults=llamacpp_faults(adapter),
    )


def _ref(merged: ModelSource, role: str) -> TensorRef:
    """The weight of ``role``; a head that stayed tied is the embedding's."""
    shared = embedding_row(merged.family, merged.decoder).role
    return merged.tensors.get(role) or merged.tensors[shared]


def untrained_said(adapter: str, changes: int, *, allowed: bool) -> str:
    """What to tell of an adapter that changes nothing; the way out unless it is ``allowed``."""
    fault = f"{adapter} is untrained: all of its {changes} changes are zero, so it does nothing"
    if allowed:
        return fault
    return f"{fault}. Take the checkpoint of after the training, or say --allow-untrained"


def changes_anything(edit: Edit, weight: TensorRef) -> bool:
    """Whether ``edit`` changes any row of a weight of that shape; reads the adapter alone.

    Stops at the first slab that changes. Of DoRA the product is looked at: its magnitudes begin as
    the lengths of the base's rows, which are not read here.
    """
    edit = getattr(edit, "low_rank", edit)
    step = rows_within(SLAB_BYTES, weight.columns)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        if isinstance(edit, Additive):
            changed = bool(np.any(edit.delta(start, stop)))
        else:
            probe = np.ones((stop - start, weight.columns), np.float32)
            changed = bool(np.any(edit.apply(probe.copy(), start, stop, 1.0) != probe))
        if changed:
            return True
    return False


def _changes(
    source: ModelSource, merged: ModelSource, threads: int | None, progress: Progress
) -> dict[str, TensorChange]:
    assert merged.merge is not None
    before = replicated(source, merged.merge.adapters)
    found = measure(before, merged, merged.merge.changed, threads=threads, progress=progress)
    return {change.role: change for change in found}


def _with_changes(facts: AdapterFacts, changes: Mapping[str, TensorChange]) -> AdapterFacts:
    """``facts`` with the change of each target, replaced tensors among them."""
    targets = [
        msgspec.structs.replace(target, change=changes.get(target.role)) for target in facts.targets
    ]
    bound = {target.role for target in targets}
    targets += [
        TargetFacts(
            role=role, name=change.name, rank=0, scale=1.0,
            trained=change.change_norm > 0, change=change,
        )
        for role, change in changes.items()
        if role not in bound
    ]  # fmt: skip
    relative = overall([target.change for target in targets if target.change])
    return msgspec.structs.replace(facts, targets=tuple(targets), relative=relative)


def _judged(changes: Sequence[TensorChange]) -> tuple[list[str], list[str]]:
    """Faults and warnings that the sizes of ``changes`` give reason for."""
    faults, warnings = [], []
    beyond = [change.name for change in changes if change.beyond_f16]
    if beyond:
        faults.append(
            f"merged, {listed(beyond)} would hold values beyond f16's 65504, which become Inf: the "
            "adapter's scale or weight is far too large, or it has another base"
        )
    huge = [change.name for change in changes if (change.relative or 0.0) > LARGE_CHANGE]
    if huge:
        warnings.append(
            f"the change is larger than the weight itself in {listed(huge)}: check the adapter's "
            "scale and weight, and that this is its base"
        )
    for kind in ("bf16", "f16"):
        share = _vanishing(changes, kind)
        if share > MUCH_VANISHING:
            other = "f16 or f32" if kind == "bf16" else "f32"
            warnings.append(
                f"{share:.0%} of the values that change would be the same as before in {kind}: "
                f"write the merged model in {other}, or quantize from float32 as convert does"
            )
    return faults, warnings


def _vanishing(changes: Sequence[TensorChange], kind: str) -> float:
    """The mean share over ``changes``."""
    shares = [getattr(change, f"vanishing_{kind}") for change in changes]
    return sum(shares) / len(shares) if shares else 0.0
