"""Convert an encoder, alone or with a decoder: its plan carried out, checked, with a manifest."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import msgspec

from edgellm import registry
from edgellm.artifact import Artifact, open_artifact
from edgellm.conversion_checks import check_suggestions
from edgellm.conversion_manifest import tensor_entry, tool_versions
from edgellm.digests import file_sha256
from edgellm.encoders.planning import EncoderPlan, FolderPlan, Source
from edgellm.encoders.quality import check_encoder
from edgellm.errors import VerificationError
from edgellm.export.encoder_graph import outputs_of
from edgellm.export.writer import StagedFolder, check_free, check_no_overlap, check_output
from edgellm.hardware import peak_memory_bytes
from edgellm.hub.circumstances import lasting, run_notes
from edgellm.made import note_made
from edgellm.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Base,
    Digested,
    EncoderFacts,
    FileEntry,
    Manifest,
    ModelFacts,
    Parity,
    Seq2SeqFacts,
)
from edgellm.parallel import one_blas_thread
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant import SOLVERS
from edgellm.slabs import Solve, write_tensors
from edgellm.source.encoder_model import EncoderSource, Seq2SeqSource
from edgellm.tokenization import artifact_parity


@dataclass(frozen=True, slots=True)
class Kind(Generic[Source]):
    """What one kind of model needs beside its plan.

    ``model``: the facts that all manifests have; ``encoder`` or ``seq2seq``: those of its own.
    ``check``: what the manifest says of a new artifact when it was run (``check``, ``quality``).
    """

    model: Callable[[FolderPlan[Source]], ModelFacts]
    check: Callable[[FolderPlan[Source], Artifact, Progress], dict[str, dict[str, Any]]]
    encoder: Callable[[FolderPlan[Source]], EncoderFacts | None] = lambda plan: None
    seq2seq: Callable[[FolderPlan[Source]], Seq2SeqFacts | None] = lambda plan: None


def carry_out_encoder(
    plan: EncoderPlan,
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of a plan that was made before; see ``carry_out``."""
    return carry_out(plan, ENCODER, out, force=force, check=check, progress=progress)


def carry_out(
    plan: FolderPlan[Source],
    kind: Kind[Source],
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of ``plan`` in the folder ``out``.

    ``check`` runs the result and compares its outputs with the float ones. Raises any
    ``EdgeError``; then nothing is left at ``out``, and an older artifact there is untouched.
    """
    check_output(out, force=force)
    check_no_overlap(plan.source.path, out)
    check_free(out, plan.disk_bytes)
    started = time.perf_counter()
    solve: Solve = registry.attribute(SOLVERS[plan.recipe.solver].attribute)
    with StagedFolder(out, force=force) as staged:
        for name, nbytes in plan.layout.data_files.items():
            staged.create_data_file(name, nbytes)
        for name, content in plan.layout.files.items():
            staged.write_file(name, content)
        with one_blas_thread():
            write_tensors(plan.layout.tensors, solve, plan.threads, staged, progress)
        staged.sync()
        digested, parity = describe(plan, kind, staged.path, progress)
        measured = {
            "created_unix_s": round(time.time()),
            "convert_s": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": plan.threads,
            "tokenizer_parity_method": parity.method,
            "platform": platform.platform(),
            **run_notes(plan.notes),
        }
        staged.write_file(MANIFEST, Manifest.of(digested, measured).to_json())
        if check:
            measured |= kind.check(plan, open_artifact(staged.path), progress)
            staged.write_file(MANIFEST, Manifest.of(digested, measured).to_json())
        staged.commit()
    note_made(out)
    return open_artifact(out)


def describe(
    plan: FolderPlan[Source], kind: Kind[Source], folder: Path, progress: Progress = unwatched
) -> tuple[Digested, Parity]:
    """What stands in ``folder``, by digests, and where it came from; and the tokenizers' verdict.

    Raises ``VerificationError`` when the artifact's tokenizer is not the source's.
    """
    layout, source = plan.layout, plan.source
    names = sorted({*layout.files, *layout.data_files})
    total = sum((folder / name).stat().st_size for name in names)
    progress(ProgressEvent("checksum", layout.main_file, 0, total))
    with ThreadPoolExecutor(plan.threads) as pool:
        base_sha256 = pool.submit(source.digest)
        files = [pool.submit(file_sha256, folder / name) for name in names]
        tensors = [pool.submit(tensor_entry, tensor, folder) for tensor in layout.tensors]
        parity = artifact_parity(source.tokenizer, folder / layout.main_file, layout.container)
        if isinstance(source, Seq2SeqSource):
            main_file = folder / layout.main_file
            check_suggestions(source.generation, main_file, layout.container)
        if parity.mismatches:
            raise VerificationError(
                "the artifact's tokenizer splits text differently from the source's, so its "
                f"outputs would differ: {'; '.join(parity.mismatches)}"
            )
        digested = Digested(
            schema_version=SCHEMA_VERSION,
            container=layout.container,
            main_file=layout.main_file,
            files=tuple(
                FileEntry(path=name, nbytes=(folder / name).stat().st_size, sha256=digest.result())
                for name, digest in zip(names, files, strict=True)
            ),
            tensors=tuple(entry.result() for entry in tensors),
            base=Base(
                name=source.name,
                kind="hf",
                revision=source.revision,
                sha256=base_sha256.result(),
                licence=source.licence,
                url=source.url,
            ),
            model=kind.model(plan),
            recipe=plan.recipe.choices(),
            recipe_sha256=plan.recipe.sha256(),
            tokenizer_sha256=source.tokenizer.sha256(),
            chat_template_sha256=source.tokenizer.chat_template_sha256(),
            tokenizer_parity=msgspec.structs.replace(parity, method=""),
            notes=lasting(plan.notes),
            tool_versions=tool_versions(layout.container),
            encoder=kind.encoder(plan),
            seq2seq=kind.seq2seq(plan),
        )
    return digested, parity


def model_facts(plan: EncoderPlan) -> ModelFacts:
    """The sizes of the network, under the names that language models have for them."""
    encoder, tokenizer = plan.source.encoder, plan.source.tokenizer
    return ModelFacts(
        family=encoder.family,
        vocab_size=encoder.vocab_size,
        hidden_size=encoder.hidden_size,
        layer_count=encoder.layers,
        head_count=encoder.heads,
        kv_head_count=encoder.heads,
        head_dim=encoder.head_dim,
        context_length=plan.layout.context_length,
        bos_token_id=tokenizer.bos_token_id,
    )


def encoder_facts(plan: EncoderPlan) -> EncoderFacts:
    """What runs the artifact of ``plan``."""
    source = plan.source
    encoder, pipeline, special = source.encoder, source.pipeline, source.tokenizer.settings
    padding = encoder.padding_id
    if padding is None:
        padding = special.special_ids.get("pad", 0)
    common = EncoderFacts(
        task=encoder.head.task,
        outputs=outputs_of(encoder),
        max_tokens=plan.layout.context_length,
        padding_token_id=padding,
        takes_types=source.tells_types,
        labels=encoder.head.labels,
        scores=encoder.head.scores,
        mask_token_id=special.special_ids.get("mask") if not encoder.head.labels else None,
    )
    if pipeline is None:
        return common
    return msgspec.structs.replace(
        common,
        mask_token_id=None,
        pooling=pipeline.pooling,
        embedding_size=pipeline.embedding_size(encoder.hidden_size),
        normalized=pipeline.normalize,
        lowercase=pipeline.lowercase,
        prompts=dict(pipeline.prompts),
        default_prompt=pipeline.default_prompt,
    )


ENCODER: Kind[EncoderSource] = Kind(model=model_facts, check=check_encoder, encoder=encoder_facts)
