"""What the manifest of a conversion says: digests, the base, calibration, versions, the merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import edgellm
from edgellm.architectures.decoder import Decoder
from edgellm.conversion_checks import prove_parity
from edgellm.digests import file_sha256, ranges_sha256
from edgellm.export import container_named
from edgellm.export.layout import OutputTensor
from edgellm.hub.circumstances import lasting
from edgellm.lora.lineage import kept_entries, merge_entry
from edgellm.lora.record import MergeRecord
from edgellm.made import CARD
from edgellm.manifest import (
    SCHEMA_VERSION,
    Base,
    CalibrationEntry,
    Digested,
    ExpertFacts,
    FileEntry,
    ModelFacts,
    Parity,
    RemoteCodeEntry,
    TensorEntry,
)
from edgellm.plan import Plan
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant import coupled, settings_of
from edgellm.quant.devices import CPU, torch_name
from edgellm.tune.settings import Tuned

if TYPE_CHECKING:
    from edgellm.remote.answering import CodeAnswers
    from edgellm.source import ModelSource

RECORDED_PACKAGES = ("libgguf", "numpy", "tokenizers")
"""Packages whose version can change the bytes of any artifact (libgguf reads GGUF sources); a
container names its own."""

CALIBRATING_PACKAGES: tuple[str, ...] = ("onnxruntime",)
"""Packages whose version can change the last bits of what is gathered, and so a code here or there.
"""


def describe(
    plan: Plan,
    folder: Path,
    progress: Progress = unwatched,
    *,
    notes: Sequence[str] = (),
    tuned: Tuned | None = None,
    ran: RemoteCodeEntry | None = None,
) -> tuple[Digested, Parity]:
    """What stands in ``folder``, by digests, and where it came from; and the tokenizers' verdict.

    ``notes`` say what was met on the way, ``ran`` which Python of the source's own was loaded.
    Raises ``VerificationError`` when the artifact's tokenizer is not the source's.
    """
    layout, source = plan.layout, plan.source
    # The model card is for people, who may go on writing it, on the Hub too.
    names = sorted({*layout.files, *layout.data_files} - {CARD})
    total = sum((folder / name).stat().st_size for name in names)
    progress(ProgressEvent("checksum", layout.main_file, 0, total))
    with ThreadPoolExecutor(plan.threads) as pool:
        base_sha256 = pool.submit(source.digest)
        files = [pool.submit(file_sha256, folder / name) for name in names]
        tensors = [pool.submit(tensor_entry, tensor, folder) for tensor in layout.tensors]
        parity = prove_parity(plan, folder)
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
                kind=source.kind,
                revision=source.revision,
                sha256=base_sha256.result(),
                licence=source.licence,
                url=source.url,
            ),
            model=_model_facts(plan),
            recipe=plan.recipe.choices(),
            recipe_sha256=plan.recipe.sha256(),
            tokenizer_sha256=source.tokenizer.sha256(),
            chat_template_sha256=source.tokenizer.chat_template_sha256(),
            tokenizer_parity=msgspec.structs.replace(parity, method=""),
            notes=(
                *lasting(plan.notes),
                *notes,
                *(limit.sentence for limit in layout.tokenizer_limits),
            ),
            tool_versions=planned_versions(plan),
            merge=merge_entry(source.merge) if source.merge else None,
            merged_before=source.merged_before,
            scaled_before=source.scaled_by,
            kept_adapters=kept_entries(layout),
            calibration=calibration_entry(plan) if plan.calibration else None,
            tuning=tuned.entry(plan.tuning.text) if tuned and plan.tuning else None,
            remote_code=ran,
        )
        return digested, parity


def calibration_entry(plan: Plan) -> CalibrationEntry:
    """What was seen of the model before its weights were rounded, and what by."""
    from edgellm.calibration.passes import TOKEN_POWER  # brings onnx with it

    calibration = plan.calibration
    assert calibration is not None
    text, given = calibration.text, calibration.given
    settings = {name: settings_of(name) for name in (*plan.recipe.transforms, plan.recipe.solver)}
    if plan.tuning is not None and plan.tuning.settings.gradient_tokens:
        settings["coupled"] = coupled.SETTINGS
    common: dict[str, Any] = {
        "gathered": calibration.needs,
        "solver": plan.recipe.solver,
        "transforms": plan.recipe.transforms,
        "settings": settings,
        "device": plan.recipe.device or CPU,
    }
    if given is not None:
        return CalibrationEntry(
            imatrix=given.name, imatrix_sha256=given.sha256, tokens=given.tokens, **common
        )
    assert text is not None
    return CalibrationEntry(
        text=text.name,
        text_sha256=text.text_sha256,
        ids_sha256=text.sha256,
        tokens=text.tokens,
        windows=len(text.windows),
        seed=text.seed,
        layers=calibration.layers,
        token_power=TOKEN_POWER if calibration.weighs else 0.0,
        **common,
    )


def tensor_entry(tensor: OutputTensor, folder: Path) -> TensorEntry:
    """``tensor`` as the manifest of ``folder``, where it was written, records it."""
    files = {array.file for array in tensor.arrays}
    if len(files) != 1:
        raise AssertionError(f"{tensor.name} is spread over {sorted(files)}")
    ranges = [(array.offset, array.nbytes) for array in tensor.arrays]
    return TensorEntry(
        name=tensor.name,
        role=tensor.role,
        shape=tensor.shape,
        grid=tensor.grid.name,
        nbytes=tensor.nbytes,
        sha256=ranges_sha256(folder / files.pop(), ranges),
        arrays=tuple((array.file, array.offset, array.nbytes) for array in tensor.arrays),
        note=tensor.note,
    )


def _model_facts(plan: Plan) -> ModelFacts:
    decoder, tokenizer = plan.source.decoder, plan.source.tokenizer
    attending = len(decoder.attending)
    return ModelFacts(
        family=decoder.family,
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        layer_count=len(decoder.layers),
        head_count=decoder.heads,
        kv_head_count=decoder.cache_heads,
        head_dim=decoder.cache_dim,
        context_length=plan.layout.context_length,
        windows=tuple(layer.window for layer in decoder.attending),
        attention_layer_count=attending if attending < len(decoder.layers) else msgspec.UNSET,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        features=tuple(sorted(feature.value for feature in decoder.features())),
        experts=_expert_facts(decoder),
    )


def _expert_facts(decoder: Decoder) -> ExpertFacts | msgspec.UnsetType:
    experts = next((layer.experts for layer in decoder.layers if layer.experts), None)
    return ExpertFacts(count=experts.count, used=experts.used) if experts else msgspec.UNSET


def planned_versions(plan: Plan) -> dict[str, str]:
    """Versions of what can change the bytes of the artifact of ``plan``."""
    computing = CALIBRATING_PACKAGES if plan.calibration else ()
    if torch_name(plan.recipe.device) is not None:
        computing = (*computing, "torch")
    return tool_versions(plan.layout.container, computing)


def tool_versions(container: str, computing: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what can change the bytes of an artifact of ``container``."""
    versions = {"edgellm": edgellm.__version__}
    packages = container_named(container).packages
    for package in dict.fromkeys((*RECORDED_PACKAGES, *packages, *computing)):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def code_entry(source: ModelSource, theirs: CodeAnswers | None) -> RemoteCodeEntry | None:
    """What a manifest says of Python that was loaded: the tokenizer's, and that of ``theirs``.

    None where none of it was.
    """
    if source.code is None:
        return None
    from edgellm.remote.finding import MODEL, TOKENIZER

    loaded = {TOKENIZER} & source.code.classes.keys()  # with the source
    if theirs is not None:
        loaded.add(MODEL)
    code = source.code.loaded_for(*loaded)
    if not code.classes:
        return None
    return RemoteCodeEntry(classes=dict(code.classes), files=code.digests())


def measured_changes(record: MergeRecord) -> dict[str, Any]:
    """How much the adapters changed each tensor: the norm of the change by that of the weight."""
    changes = record.complete()
    change = math.hypot(*(each.change_norm for each in changes.values()))
    weight = math.hypot(*(each.weight_norm for each in changes.values()))
    return {
        "relative_change": change / weight if weight else None,
        "relative_change_by_tensor": {
            role: each.relative if math.isfinite(each.relative) else None
            for role, each in changes.items()
        },
    }
