"""Convert: stream the weights of a plan through a solver and a packer into an artifact.

Knows no method and no format by name. Memory follows one slab of rows for each worker, and the
bytes are the same for any number of workers, because slabs are cut and placed by the plan.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import edgellm
from edgellm import quality_gate, registry
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.experts import stack_of
from edgellm.architectures.gguf_latent import VALUES, WHOLE
from edgellm.calibration.running import Outcome, round_in_blocks
from edgellm.digests import file_sha256, ranges_sha256
from edgellm.encoders.finding import find_encoder
from edgellm.errors import (
    GenerationError,
    RuntimeMissing,
    UnsupportedTarget,
    UsageError,
    VerificationError,
)
from edgellm.export import container_named
from edgellm.export.layout import OutputTensor
from edgellm.export.writer import StagedFolder, begun_before, check_output
from edgellm.generation_defaults import lost_suggestions
from edgellm.hardware import peak_memory_bytes
from edgellm.hub.circumstances import lasting, run_notes
from edgellm.lora.lineage import kept_entries, merge_entry
from edgellm.lora.record import MergeRecord
from edgellm.made import CARD, note_made
from edgellm.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    Base,
    CalibrationEntry,
    Digested,
    ExpertFacts,
    FileEntry,
    Manifest,
    ModelFacts,
    Parity,
    RemoteCodeEntry,
    TensorEntry,
    open_artifact,
)
from edgellm.parallel import one_blas_thread
from edgellm.plan import Plan, check_apart, check_disk, make_plan
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant import SOLVERS, settings_of
from edgellm.quant.devices import CPU, torch_name
from edgellm.recipe import Recipe
from edgellm.slabs import Solve, write_tensors
from edgellm.tensors import Array
from edgellm.tokenization import artifact_parity
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

CHECK_PROMPT = "The capital of France is"
CHECK_TOKENS = 8
CHECK_CONTEXT_TOKENS = 64


def convert(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    check: bool = True,
    save_imatrix: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact that ``recipe`` asks for, written to the folder ``out``.

    ``check`` loads the result, generates a few tokens with it, compares its answers with the
    source's, and measures what is left of the adapters that were merged. ``trust_remote_code`` lets
    Python that the source brings be run, to compare with; no recipe can say that. Raises any
    ``EdgeError``; then nothing is left at ``out``, and an older artifact there is untouched. What
    exceeds the recipe's ``max_kld`` or ``max_ppl_increase`` lies beside it, as ``OUT.rejected``.
    """
    check_output(out, force=force)
    encoder = find_encoder(recipe, progress=progress)
    if encoder is not None:
        from edgellm.encoders.kinds import convert_found, refuse_code, refuse_imatrix

        refuse_imatrix(save_imatrix)
        refuse_code(trust_remote_code)
        return convert_found(
            recipe, encoder, out, threads=threads, force=force, check=check, progress=progress
        )
    plan = make_plan(
        recipe, threads=threads, trust_remote_code=trust_remote_code, progress=progress
    )
    return carry_out(
        plan, out, force=force, check=check, save_imatrix=save_imatrix, progress=progress
    )


def carry_out(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    save_imatrix: Path | None = None,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of a plan that was made before; see ``convert``."""
    check_output(out, force=force)
    check_apart(plan.source, out)
    check_disk(plan, out)
    if save_imatrix is not None and (plan.calibration is None or plan.calibration.text is None):
        raise UsageError(
            f"there is no importance to save in {save_imatrix}: {plan.recipe.quant} is rounded "
            f"without a calibration text; choose --quant gptq:{plan.recipe.grid}"
        )
    quality_gate.check_ready(plan, out, check=check)
    started = time.perf_counter()
    theirs, own_code = _by_own_code(plan, check, progress)
    ran = _code_entry(plan.source, theirs)
    with StagedFolder(out, force=force, resume_key=resume_key(plan)) as staged:
        for name, nbytes in plan.layout.data_files.items():
            staged.create_data_file(name, nbytes)
        for name, content in plan.layout.files.items():
            if name in plan.layout.data_files:
                staged.write_at(name, 0, content)
            else:
                staged.write_file(name, content)
        with one_blas_thread():
            outcome = quantize_tensors(plan, staged, progress)
        if save_imatrix is not None:
            write_importance(plan, outcome, save_imatrix)
        tuned = tune_tensors(plan, staged, progress)
        staged.sync()
        digested, parity = describe(
            plan, staged.path, progress, notes=outcome.notes, tuned=tuned, ran=ran
        )
        measured = {
            "created_unix_s": round(time.time()),
            "convert_s": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": plan.threads,
            "tokenizer_parity_method": parity.method,
            "platform": platform.platform(),
        }
        measured |= run_notes(plan.notes)
        if own_code:
            measured["remote_code"] = own_code
        if outcome.measured:
            measured["calibration"] = outcome.measured
        if plan.fitted is not None:
            measured["fit"] = plan.fitted.figures()
        if tuned is not None:
            measured["tuning"] = tuned.figures()
        if plan.source.merge is not None:
            measured["merge"] = measured_changes(plan.source.merge.record)
        staged.write_file(MANIFEST, Manifest.of(digested, measured).to_json())
        if check:
            progress(ProgressEvent("check", CHECK_PROMPT, 0, 0))
            measured["check"] = check_artifact(open_artifact(staged.path))
        made = open_artifact(staged.path)
        measured |= quality_gate.compare(
            plan, made, check=check, reference=theirs, progress=progress
        )
        staged.write_file(MANIFEST, Manifest.of(digested, measured).to_json())
        if rejected := quality_gate.verdict(measured):
            raise quality_gate.refusal(rejected, staged.put_aside(), plan.recipe)
        staged.commit()
    note_made(out)
    return open_artifact(out)


def _by_own_code(
    plan: Plan, check: bool, progress: Progress
) -> tuple[CodeAnswers | None, dict[str, Any]]:
    """The answers of the source by its own Python, and how near edgellm's float network is to them.

    None and nothing where no such Python is trusted; the reason where it does not load. It is not
    held in memory while weights are rounded. Raises ``VerificationError`` where the network is not
    what that Python computes.
    """
    if plan.source.code is None:
        return None, {}
    if not check:
        return None, {"skipped": "--no-check"}
    from edgellm.remote.answering import open_code_answers, prove_reading

    theirs, why = open_code_answers(plan.source, threads=plan.threads)
    if theirs is None:
        return None, {"skipped": why}
    with closing(theirs):
        read = prove_reading(plan.source, theirs, threads=plan.threads, progress=progress)
    return theirs, msgspec.to_builtins(read)


def _code_entry(source: ModelSource, theirs: CodeAnswers | None) -> RemoteCodeEntry | None:
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


def quantize_tensors(plan: Plan, staged: StagedFolder, progress: Progress = unwatched) -> Outcome:
    """Write every tensor of the plan: load, solve, pack and place one slab of rows at a time.

    With a calibration, block by block instead: ``round_in_blocks``.

    Raises ``TensorError`` naming a tensor that holds NaN, Inf, or more than its grid reaches.
    """
    calibration = plan.calibration
    if calibration is not None:
        return round_in_blocks(plan, calibration, staged, progress)
    solve: Solve = registry.attribute(SOLVERS[plan.recipe.solver].attribute)
    write_tensors(plan.layout.tensors, solve, plan.threads, staged, progress)
    return Outcome()


def write_importance(plan: Plan, outcome: Outcome, path: Path) -> None:
    """Write what was found of the weights' inputs as llama.cpp reads it."""
    from edgellm.quant.imatrix_file import HEAD, write_imatrix

    assert plan.calibration is not None
    text = plan.calibration.text
    assert text is not None
    # llama.cpp calls the head so whether it is tied or not.
    names = {"token_embd.weight": HEAD}
    found: dict[str, list[Array]] = {}
    counts: dict[str, list[float]] = {}
    decoder, layout = plan.source.decoder, plan.source.family.gguf
    absorbed = layout is not None and layout.absorbed
    for role, values in outcome.importance.items():
        stack = stack_of(role)
        if absorbed and WHOLE in role:
            # llama.cpp's quantizer asks for that of values, of each head; their latent is one.
            name = role.replace(WHOLE, VALUES)
            found[name] = [values] * decoder.heads
            counts[name] = [float(text.tokens)] * decoder.heads
            continue
        found.setdefault(stack or names.get(role, role), []).append(values)
        if stack:
            counts.setdefault(stack, []).append(float(outcome.tokens[role]))
    write_imatrix(
        path,
        {name: np.concatenate(parts) for name, parts in found.items()},
        counts={name: np.asarray(each, np.float32) for name, each in counts.items()},
        tokens=text.tokens,
        chunk_tokens=len(text.windows[0]),
        datasets=[text.name],
    )


def tune_tensors(plan: Plan, staged: StagedFolder, progress: Progress = unwatched) -> Tuned | None:
    """Train what the codes that were written are scaled by, where the plan says so."""
    if plan.tuning is None:
        return None
    from edgellm.tune.tuning import tune  # brings torch with it

    return tune(plan.layout, plan.source, staged, plan.tuning, plan.threads, progress)


def resume_key(plan: Plan) -> str:
    """Digest of all that the bytes of a calibrated conversion follow from; empty without.

    A run with the same key may go on from what another one left.
    """
    calibration = plan.calibration
    if calibration is None:
        return ""
    layout, source = plan.layout, plan.source
    parts = {
        "recipe": plan.recipe.choices(),
        "source": source.digest(),
        "adapters": [adapter.digest() for adapter in source.merge.adapters] if source.merge else [],
        "calibrated_with": calibration.sha256,
        "files": {
            name: hashlib.sha256(content).hexdigest() for name, content in layout.files.items()
        },
        "tensors": [
            (
                tensor.name,
                tensor.grid.name,
                tensor.packer,
                [astuple(each) for each in tensor.arrays],
            )
            for tensor in layout.tensors
        ],
        "versions": _tool_versions(plan),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def begun_blocks(plan: Plan, out: Path) -> list[str]:
    """The blocks that a stopped run of the same plan to ``out`` has done."""
    key = resume_key(plan)
    entries = begun_before(out, key) if key else []
    return [entry["block"] for entry in entries if "block" in entry]


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


def prove_parity(plan: Plan, folder: Path) -> Parity:
    """The verdict on the tokenizer of the artifact in ``folder`` against the source's.

    Raises ``VerificationError`` with examples when they split text differently, and for sampling
    that the artifact suggests otherwise.
    """
    main_file, container = folder / plan.layout.main_file, plan.layout.container
    parity = artifact_parity(
        plan.source.tokenizer, main_file, container, plan.layout.tokenizer_limits
    )
    check_suggestions(plan.source.generation, main_file, container)
    if parity.mismatches:
        raise VerificationError(
            "the artifact's tokenizer splits text differently from the source's, so its answers "
            f"would differ: {'; '.join(parity.mismatches)}"
        )
    return parity


def check_suggestions(generation: Mapping[str, Any], main_file: Path, container: str) -> None:
    """Raise ``VerificationError`` where an artifact suggests another sampling than the source."""
    if lost := lost_suggestions(generation, main_file, container):
        raise VerificationError(f"what was made is not kept: {'; '.join(lost)}")


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
            tool_versions=_tool_versions(plan),
            merge=merge_entry(source.merge) if source.merge else None,
            merged_before=source.merged_before,
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
    common: dict[str, Any] = {
        "gathered": calibration.needs,
        "solver": plan.recipe.solver,
        "transforms": plan.recipe.transforms,
        "settings": {
            name: settings_of(name) for name in (*plan.recipe.transforms, plan.recipe.solver)
        },
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


def _tool_versions(plan: Plan) -> dict[str, str]:
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


def check_artifact(artifact: Artifact) -> dict[str, Any]:
    """What a few greedy tokens of a new artifact look like, on the runtime that ``run`` would pick.

    Where no runtime here can open it, the reason stands in ``skipped``. Raises
    ``VerificationError`` when it does not run, or its logits are not finite.
    """
    from edgellm.chat import open as open_model  # a backend takes longer to import than to convert

    assert artifact.manifest is not None
    if artifact.container == "hf":
        return {"skipped": "torch would hold all weights as floats at once (edgellm run asks it)"}
    room = min(CHECK_CONTEXT_TOKENS, artifact.manifest.artifact.model.context_length)
    prompt = CHECK_PROMPT
    try:
        with open_model(artifact.path, verify=False, context_tokens=room) as session:
            while len(session.tokenizer.encode(prompt, add_special=True)) >= room > 1:
                prompt = prompt[: len(prompt) // 2]
            result = session.generate(prompt, max_tokens=CHECK_TOKENS, raw=True)
    except (RuntimeMissing, UnsupportedTarget) as error:
        return {"skipped": str(error)}
    except GenerationError as error:
        raise VerificationError(
            f"what was made does not run, and is not kept (--no-check would): {error}"
        ) from error
    return {
        "prompt": prompt,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "runtime": result.runtime,
    }
