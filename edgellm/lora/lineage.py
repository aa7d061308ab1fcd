"""What a model was made of that its weights do not show: recorded beside them, and read back.

Which adapters are merged into it, and by what its channels were scaled: in manifests and in keys of
GGUF files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgellm.errors import SourceError, VerificationError
from edgellm.manifest import (
    MANIFEST,
    AdapterEntry,
    Digested,
    KeptEntry,
    MergeEntry,
    read_manifest,
)
from edgellm.quant import TRANSFORMS

if TYPE_CHECKING:
    from edgellm.export.layout import Layout
    from edgellm.lora.adapter import Adapter
    from edgellm.lora.binding import Combination
    from edgellm.lora.merging import Merge
    from edgellm.source.model import ModelSource

GGUF_KEY = "edgellm.adapters"
"""Key of a GGUF file with every adapter that was ever merged in, as JSON; beside it the standard
``general.base_model.*`` keys name them for other readers."""

SCALED_KEY = "edgellm.scaled_by"
"""Key of a GGUF file with the transforms that scaled channels of its weights, joined by ``+``."""

BASE_MODEL = "general.base_model."
HUB_URL = "https://huggingface.co/"


def adapter_entries(merge: Merge) -> tuple[AdapterEntry, ...]:
    """The adapters of ``merge`` as a manifest records them; reads their files for the digests."""
    return entries_of(merge.adapters, merge.bindings)


def entries_of(
    adapters: Iterable[Adapter], bindings: Iterable[Collection[str]]
) -> tuple[AdapterEntry, ...]:
    """``adapters`` as a manifest records them, each with the weights that it binds."""
    return tuple(
        adapter_entry(adapter, len(bound) + len(adapter.replaced))
        for adapter, bound in zip(adapters, bindings, strict=True)
    )


def adapter_entry(adapter: Adapter, changed_tensors: int) -> AdapterEntry:
    """``adapter`` as a manifest records it; reads its files for the digest."""
    config = adapter.config
    alpha = config.get("lora_alpha", config.get("alpha"))
    # AdaLoRA's configs hold LoRA's r beside their own, unused.
    rank = config.get("init_r" if adapter.kind == "adalora" else "r")
    return AdapterEntry(
        name=adapter.name,
        sha256=adapter.digest(),
        kind=adapter.kind,
        weight=adapter.weight,
        rank=rank if isinstance(rank, int) else None,
        alpha=float(alpha) if isinstance(alpha, (int, float)) else None,
        base_name=without_place(adapter.base_name),
        base_revision=adapter.base_revision,
        revision=adapter.revision,
        changed_tensors=changed_tensors,
    )


def without_place(name: str) -> str:
    """A Hub id as it is; of a path the last part, for where it lay is nobody's business."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    is_id = len(parts) == 2 and parts[0] not in ("", ".", "..", "~")
    return name if is_id else parts[-1]


def kept_entries(layout: Layout) -> tuple[KeptEntry, ...]:
    """The adapters that ``layout`` puts beside the model, as a manifest records them."""
    return tuple(
        KeptEntry(
            file=beside.file,
            **msgspec.structs.asdict(adapter_entry(beside.adapter, len(beside.adapter.parts))),
        )
        for beside in layout.adapters
    )


def merge_entry(merge: Merge) -> MergeEntry:
    """``merge`` as a manifest records it, once every weight was loaded."""
    entry = combined_entry(adapter_entries(merge), merge.combination, merge.record.sha256())
    return msgspec.structs.replace(entry, base=merge.into, base_reason=merge.reason)


def combined_entry(
    adapters: tuple[AdapterEntry, ...], combination: Combination, merged_sha256: str = ""
) -> MergeEntry:
    """``adapters`` and what of their ``combination`` matters to its method."""
    from edgellm.lora.combine.methods import METHODS

    method = METHODS[combination.method]
    return MergeEntry(
        adapters=adapters,
        method=combination.method,
        density=combination.density,
        sign=combination.sign if method.elect else None,
        rank=combination.rank,
        seed=combination.seed if method.prune == "random" else None,
        merged_sha256=merged_sha256,
    )


def merged_twice(source: ModelSource) -> tuple[str, ...]:
    """A warning for each adapter of ``source`` that its base says it holds already."""
    if source.merge is None:
        return ()
    return held_already(source.merge.base.name, source.merge.adapters, source.merged_before)


def held_already(
    base: str, adapters: Iterable[Adapter], merged_before: Iterable[AdapterEntry]
) -> tuple[str, ...]:
    """A warning for each of ``adapters`` that stands among those merged into ``base`` before."""
    held = {entry.sha256: entry.name for entry in merged_before}
    warnings = []
    for adapter in adapters:
        names = [held[digest] for digest in adapter.digests() if digest in held]
        if names:
            known = "" if adapter.name in names else f" (as {names[0]})"
            warnings.append(
                f"WARNING: {adapter.name} has been merged into {base} before{known}: its change is "
                "in there twice now; convert the original base, or leave the adapter out"
            )
    return tuple(warnings)


def on_scaled(
    base: str, adapters: Iterable[Adapter], scaled_by: Collection[str]
) -> tuple[str, ...]:
    """A warning for each of ``adapters`` that is merged into a base with scaled channels."""
    if not scaled_by:
        return ()
    return tuple(
        f"WARNING: channels of {base} were scaled by {' and '.join(scaled_by)} when it was "
        f"rounded, and {adapter.name} fits only if it was trained on that very model: merge it "
        "into the original instead"
        for adapter in adapters
    )


def gguf_lineage(source: ModelSource, parents: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a GGUF file that say where its weights come from.

    ``parents`` are the ``general.base_model.*`` keys without the adapters merged now, which are
    added to them as further parents, as Hugging Face's model cards list them for a merged model.
    """
    keys = dict(parents)
    count = int(keys.get(f"{BASE_MODEL}count", 0))
    merged = adapter_entries(source.merge) if source.merge else ()
    for index, entry in enumerate(merged, count):
        organization, slash, _ = entry.name.rpartition("/")
        keys |= {
            f"{BASE_MODEL}{index}.name": entry.name,
            f"{BASE_MODEL}{index}.organization": organization,
            f"{BASE_MODEL}{index}.version": entry.revision,
            f"{BASE_MODEL}{index}.description": described(entry),
            f"{BASE_MODEL}{index}.repo_url": HUB_URL + entry.name if slash else "",
        }
    keys[f"{BASE_MODEL}count"] = count + len(merged)
    if everything := source.merged_before + merged:
        keys[GGUF_KEY] = msgspec.json.encode(everything, order="sorted").decode()
    if source.scaled_by:
        keys[SCALED_KEY] = "+".join(source.scaled_by)
    return keys


def described(entry: AdapterEntry) -> str:
    """An adapter in one line: kind, rank, alpha, weight, digest."""
    rank = f", rank {entry.rank}" if entry.rank is not None else ""
    alpha = f", alpha {entry.alpha:g}" if entry.alpha is not None else ""
    return f"{entry.kind} adapter{rank}{alpha}, weight {entry.weight:g}, sha256 {entry.sha256}"


def from_gguf(metadata: Mapping[str, Any]) -> tuple[AdapterEntry, ...]:
    """The adapters that a GGUF file says are merged into it.

    Raises ``SourceError`` where our own key is not what we write.
    """
    text = metadata.get(GGUF_KEY)
    if text is None:
        return ()
    try:
        return msgspec.json.decode(text, type=tuple[AdapterEntry, ...])
    except (msgspec.DecodeError, TypeError) as error:
        raise SourceError(
            f"{GGUF_KEY} is not a list of adapters ({error}): the file was changed, or is damaged"
        ) from error


def scaled_in_gguf(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The transforms that a GGUF file says scaled channels of its weights, oldest first."""
    return tuple(filter(None, str(metadata.get(SCALED_KEY, "")).split("+")))


def from_folder(folder: Path) -> tuple[AdapterEntry, ...]:
    """The adapters that the manifest in a model folder says are merged into it.

    Empty where there is no manifest, or one of another program. Raises ``SourceError`` for a
    manifest of ours that was changed.
    """
    made = _made(folder)
    if made is None:
        return ()
    return made.merged_before + (made.merge.adapters if made.merge else ())


def scaled_in_folder(folder: Path) -> tuple[str, ...]:
    """The transforms that the manifest in a model folder says scaled channels of its weights.

    Empty and raising as ``from_folder``.
    """
    made = _made(folder)
    return () if made is None else scaled_by(made)


def scaled_by(made: Digested) -> tuple[str, ...]:
    """The transforms that scaled channels of an artifact's weights, oldest first."""
    own = made.calibration.transforms if made.calibration else ()
    return (*made.scaled_before, *(name for name in own if name in TRANSFORMS))


def _made(folder: Path) -> Digested | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return read_manifest(folder).artifact
    except VerificationError as error:
        raise SourceError(f"{error}; delete {MANIFEST} to convert without its history") from error
    except SourceError:
        return None
