"""Merge: adapters put into a base's own checkpoint, which transformers then loads as it is.

Works on the checkpoint's names, so the base may be of any architecture. Memory follows one slab of
rows for each worker and the factors in use; the bytes are the same for any number of workers.
"""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import (
    AdapterError,
    EdgeError,
    SourceError,
    UnsupportedModel,
    UsageError,
)
from edgellm.export import hf_folder
from edgellm.export.shard_writer import ShardWriter
from edgellm.export.to_safetensors import Shard, lay_out_shards, pieces_of
from edgellm.export.writer import StagedFolder, check_free, check_no_overlap, check_output
from edgellm.folder_manifest import describe, vanishing_notes
from edgellm.hardware import detect, peak_memory_bytes
from edgellm.hub.circumstances import run_notes
from edgellm.json_file import read_json
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.folder_base import folder_base, refuse_untrained
from edgellm.lora.binding import Combination
from edgellm.lora.checkpoint_weights import named_weights
from edgellm.lora.lineage import (
    entries_of,
    from_folder,
    held_already,
    on_scaled,
    scaled_in_folder,
)
from edgellm.lora.memory import merge_bytes
from edgellm.lora.named_weights import ChangedWeight, MergedWeights, NamedWeights, merge_by_name
from edgellm.lora.requested import opened
from edgellm.lora.vocabulary import brought_tokenizer, check_rows
from edgellm.made import note_made
from edgellm.manifest import MANIFEST, AdapterEntry, Base, Manifest
from edgellm.parallel import in_parallel, one_blas_thread
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.floats import ENCODERS
from edgellm.recipe import Recipe
from edgellm.source.checkpoint import INDEX, licence_of, read_checkpoint
from edgellm.source.safetensors_file import SafetensorsFile, read_safetensors
from edgellm.tensors import SLAB_BYTES
from edgellm.tokenization import Tokenizer

SLAB_COPIES = 4
"""Slabs alive at once in a worker at the most: pieces that wait for their turn to be hashed."""

WHOLE_COPIES = 8
"""The same for a matrix that is turned round whole, most of them in float32."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write, known before a weight is read.

    ``weights`` and ``merged`` are the base and what the adapters make of it. ``files`` are all
    others than the shards. ``tokenizer`` is None for one of a kind that edgellm does not read.
    ``into``: on which base the adapters are put, ``full`` or ``dequantized``, and why.
    """

    recipe: Recipe
    path: Path
    base: Base
    config: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    combination: Combination
    weights: NamedWeights
    merged: MergedWeights
    shards: tuple[Shard, ...]
    files: dict[str, bytes]
    tokenizer: Tokenizer | None
    merged_before: tuple[AdapterEntry, ...]
    scaled_by: tuple[str, ...]
    into: tuple[str, str]
    notes: tuple[str, ...]
    threads: int

    @property
    def output_bytes(self) -> int:
        """Bytes of all files, the manifest apart."""
        return sum(shard.nbytes for shard in self.shards) + sum(map(len, self.files.values()))

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the embedding after the merge; None where no tensor is known to be that."""
        return _rows(self.weights, self.merged)

    @property
    def peak_memory_bytes(self) -> int:
        """This process as it is now, and what the workers and the adapters' factors take."""
        tensors = [tensor for shard in self.shards for tensor in shard.tensors]
        turned = max((tensor.nbytes for tensor in tensors if tensor.in_one_piece), default=0)
        worker = max(SLAB_COPIES * SLAB_BYTES, WHOLE_COPIES * turned)
        shapes = [change.start.shape for change in self.merged.changed.values() if change.edit]
        now: int = psutil.Process().memory_info().rss
        return now + self.threads * worker + merge_bytes(self.adapters, self.combination, shapes)

    def adapter_entries(self) -> tuple[AdapterEntry, ...]:
        """The adapters as the manifest records them; their files are read for the digests."""
        return entries_of(self.adapters, self.merged.bindings)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that adapters change, in the order of the shards."""
        return tuple(
            tensor.name for shard in self.shards for tensor in shard.tensors if tensor.change
        )


@dataclass(frozen=True, slots=True)
class Located:
    """A base's folder on this disk, and what is known of where it came from."""

    path: Path
    name: str
    revision: str = ""
    licence: str = ""
    url: str = ""
    notes: tuple[str, ...] = ()


def make_plan(
    recipe: Recipe,
    out: Path | None = None,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = unwatched,
) -> MergePlan:
    """Everything that merging by ``recipe`` will do; headers are read, weights are not.

    ``out``: where it will be written, looked at beforehand if it is given. ``recipe.quant`` is the
    dtype of all floats, by default each keeps its own. Raises every error that can be known
    beforehand: a damaged base or adapter, keys that match nothing, shapes.
    """
    if out is not None:
        check_output(out, force=force)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    if recipe.quant is not None and recipe.quant not in ENCODERS:
        raise UsageError(f"--dtype {recipe.quant} is not written: choose {', '.join(ENCODERS)}")
    if not recipe.adapters:
        raise UsageError("merge needs at least one --adapter PATH[=WEIGHT]")
    found = _located(recipe, progress)
    config = _config_of(found.path, recipe)
    checkpoint = read_checkpoint(found.path)
    files = tuple(read_safetensors(file) for file in checkpoint.files)
    adapters, combination, facts = opened(recipe, progress=progress)
    _refuse_replication(adapters, found.path)
    vouched = recipe.ignore_config_keys
    adapters = [_in_checkpoint_terms(adapter, found.path, vouched) for adapter in adapters]
    stored = named_weights(found.name, config, files, adapters)
    into = folder_base(found.path, stored, adapters, recipe.merge_base, ignore_config_keys=vouched)
    weights = into.weights
    merged = into.settled(merge_by_name(weights, adapters, combination))
    untrained = refuse_untrained(weights, adapters, merged.bindings, allowed=recipe.allow_untrained)
    shards = _shards(files, weights, merged, recipe.quant)
    tokenizer, giver, tokenizer_notes = _tokenizer(found, adapters, _rows(weights, merged))
    companions, notes = hf_folder.companion_files(
        found.path, giver.tokenizer_folder if giver else None
    )
    companions[hf_folder.CONFIG] = hf_folder.changed_config(
        companions[hf_folder.CONFIG], _config_changes(config, weights, merged, recipe.quant)
    )
    licence = found.licence or licence_of(found.path / hf_folder.CARD)
    companions[hf_folder.CARD] = hf_folder.card(found.name, licence, adapters)
    if (found.path / INDEX).exists():
        companions[INDEX] = _index(shards)
    merged_before = from_folder(found.path)
    scaled_by = scaled_in_folder(found.path)
    return MergePlan(
        recipe=recipe,
        path=found.path,
        base=Base(
            name=found.name,
            kind="hf",
            revision=found.revision,
            licence=licence,
            url=found.url,
        ),
        config=config,
        adapters=tuple(adapters),
        combination=combination,
        weights=weights,
        merged=merged,
        shards=shards,
        files=companions,
        tokenizer=tokenizer,
        merged_before=merged_before,
        scaled_by=scaled_by,
        into=(into.kind, into.reason),
        notes=(
            *held_already(found.name, adapters, merged_before),
            *on_scaled(found.name, adapters, scaled_by),
            *untrained,
            into.reason,
            *into.notes,
            *found.notes,
            *facts,
            *(note for adapter in adapters for note in adapter.notes),
            *merged.notes,
            *tokenizer_notes,
            *notes,
        ),
        threads=threads or detect().physical_cores.value,
    )


def merge(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = unwatched,
) -> Artifact:
    """The folder that ``recipe`` asks for, written to ``out``.

    Raises any ``EdgeError``; then nothing is left at ``out``, and an older one is untouched.
    """
    plan = make_plan(recipe, out, threads=threads, force=force, progress=progress)
    return carry_out(plan, out, force=force, progress=progress)


def carry_out(
    plan: MergePlan, out: Path, *, force: bool = False, progress: Progress = unwatched
) -> Artifact:
    """The folder of a plan that was made before; see ``merge``."""
    for path in (plan.path, *(adapter.path for adapter in plan.adapters)):
        check_no_overlap(path, out)
    check_free(out, plan.output_bytes)
    started = time.perf_counter()
    with StagedFolder(out, force=force) as staged:
        for shard in plan.shards:
            staged.create_data_file(shard.name, shard.nbytes)
        for name, content in plan.files.items():
            staged.write_file(name, content)
        writer = ShardWriter(plan.shards, staged)
        with one_blas_thread():
            vanished = _write(plan, writer, progress)
        staged.sync()
        measured = {
            "created_unix_s": round(time.time()),
            "merge_s": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": plan.threads,
            "platform": platform.platform(),
            "vanished": vanished,
            **run_notes(plan.notes),
        }
        digested = describe(plan, writer, vanishing_notes(vanished))
        staged.write_file(MANIFEST, Manifest.of(digested, measured).to_json())
        staged.commit()
    note_made(out)
    return open_artifact(out)


def _write(plan: MergePlan, writer: ShardWriter, progress: Progress) -> dict[str, Any]:
    """Work on every piece; and the share of changed values that vanished, in all and by tensor."""
    pieces = list(pieces_of(plan.shards))
    total = sum(shard.nbytes for shard in plan.shards)
    done_bytes = 0
    counts: dict[str, list[int]] = {}
    for done in in_parallel(writer.work, pieces, plan.threads, on_end=writer.stop):
        piece = done.piece
        done_bytes += piece.nbytes
        shard = plan.shards[piece.shard]
        name = shard.name if piece.tensor is None else shard.tensors[piece.tensor].name
        if done.changed:
            count = counts.setdefault(name, [0, 0])
            count[0] += done.changed
            count[1] += done.vanished
        progress(ProgressEvent("merge", name, done_bytes, total))
    changed, lost = (sum(count[index] for count in counts.values()) for index in (0, 1))
    return {
        "share": lost / changed if changed else None,
        "share_by_tensor": {name: count[1] / count[0] for name, count in sorted(counts.items())},
    }


def _located(recipe: Recipe, progress: Progress) -> Located:
    """The base's folder; raises ``UnsupportedModel`` for a GGUF file."""
    text = recipe.source
    path = Path(text).expanduser()
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.exists() or text.endswith(".gguf"):
        raise UnsupportedModel(
            f"{text} is no Hugging Face folder, and merge writes the base's own shards: give the "
            "folder of the original model, or have a GGUF made with the adapter in it "
            f"(`{_converting(recipe)}`)"
        )
    from edgellm.hub.download import download
    from edgellm.hub.ids import parse_hub_id

    wanted = None if text.startswith((".", "~")) else parse_hub_id(text)
    if wanted is None:
        raise SourceError(
            f"no folder {text}, and it does not read like a Hub id (org/name, org/name@revision): "
            "check the path"
        )
    found = download(wanted, progress)
    return Located(found.path, wanted.repo, found.revision, found.licence, wanted.url, found.notes)


def _converting(recipe: Recipe) -> str:
    """The command that makes an artifact of the same base and adapters."""
    adapters = " ".join(f"--adapter {shlex.quote(adapter)}" for adapter in recipe.adapters)
    return f"edgellm convert {shlex.quote(recipe.source)} {adapters} --out DIR"


def _config_of(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """``config.json``; raises for an adapter, no model, or one that is quantized."""
    if not (folder / hf_folder.CONFIG).exists():
        what = "an adapter" if (folder / "adapter_config.json").exists() else "no model"
        raise SourceError(
            f"{folder} is {what} ({hf_folder.CONFIG} is missing): give the folder of the base "
            "first, and each adapter by --adapter"
        )
    config = read_json(folder / hf_folder.CONFIG)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedModel(
            f"{folder} is quantized already ({method}), and a merged weight would have to be "
            "rounded to its grid once more: merge into the model in bf16, f16 or f32 that it was "
            "made from, or have it converted with the adapter in it "
            f"(`{_converting(recipe)}`)"
        )
    return config


def _refuse_replication(adapters: Sequence[Adapter], base: Path) -> None:
    for adapter in adapters:
        if adapter.config.get("layer_replication"):
            raise AdapterError(
                f"{adapter.name} repeats layers (layer_replication), and merge keeps those of the "
                f"base: `edgellm convert {base} --adapter {adapter.path} --out DIR` repeats them"
            )


def _in_checkpoint_terms(adapter: Adapter, base: Path, vouched: Collection[str]) -> Adapter:
    """An adapter by Hugging Face names; one out of a GGUF needs the family to be known."""
    if adapter.naming == "hf":
        return adapter
    from edgellm.lora.reading.gguf_adapter import in_checkpoint_terms
    from edgellm.source import open_source

    return in_checkpoint_terms(adapter, open_source(str(base), ignore_config_keys=vouched))


def _shards(
    files: Sequence[SafetensorsFile],
    weights: NamedWeights,
    merged: MergedWeights,
    dtype: str | None,
) -> tuple[Shard, ...]:
    stored = {name for file in files for name in file.tensors}
    changed = dict(merged.changed)
    embedding, head = weights.embedding, weights.head
    # A head that is tied and stored all the same follows the embedding.
    if merged.tied and head in stored and embedding in changed:
        changed[head] = changed[embedding]
    added = {name: change for name, change in changed.items() if name not in stored}
    return lay_out_shards(
        files, {name: each for name, each in changed.items() if name in stored}, added, dtype
    )


def _rows(weights: NamedWeights, merged: MergedWeights) -> int | None:
    """Rows of the embedding after the merge; None where it is not known which tensor that is."""
    if weights.embedding is None:
        return None
    change: ChangedWeight | None = merged.changed.get(weights.embedding)
    ref = weights.weights[weights.embedding].ref if change is None else change.start
    return ref.shape[0]


def _tokenizer(
    base: Located, adapters: Sequence[Adapter], rows: int | None
) -> tuple[Tokenizer | None, Adapter | None, list[str]]:
    """The merged model's tokenizer, the adapter that it comes from if one does, and notes.

    None for a kind that edgellm does not read: its files are copied from the base.
    """
    try:
        ours = Tokenizer.from_hf_folder(base.path)
    except EdgeError as error:
        brings = [adapter.name for adapter in adapters if adapter.tokenizer_folder is not None]
        note = f"the tokenizer was copied and not looked into: {error}"
        if brings:
            note += f"; {', '.join(brings)} may bring another, which was left out"
        return None, None, [note]
    brought, giver, notes = brought_tokenizer(ours, adapters)
    chosen = brought or ours
    if rows is not None:
        check_rows(giver.name if giver else base.name, chosen.vocab_size, rows)
    return chosen, giver, notes


def _config_changes(
    config: Mapping[str, Any], weights: NamedWeights, merged: MergedWeights, dtype: str | None
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    rows = _rows(weights, merged)
    if weights.embedding in merged.changed and rows is not None:
        changes["vocab_size"] = rows
    if merged.tied != weights.tied:
        changes["tie_word_embeddings"] = merged.tied
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        changes[key] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    return changes


def _index(shards: Sequence[Shard]) -> bytes:
    return hf_folder.index_file(
        sum(tensor.nbytes for shard in shards for tensor in shard.tensors),
        {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    )
