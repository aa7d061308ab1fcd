"""Convert: stream the weights of a plan through a solver and a packer into an artifact.

Knows no method and no format by name. Memory follows one slab of rows for each worker, and the
bytes are the same for any number of workers, because slabs are cut and placed by the plan.
"""

from __future__ import annotations

import platform
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgellm import quality_gate, registry
from edgellm.architectures.experts import stack_of
from edgellm.architectures.gguf_latent import VALUES, WHOLE
from edgellm.artifact import Artifact, open_artifact
from edgellm.calibration.running import Outcome, round_in_blocks
from edgellm.calibration.splitting import Splitting
from edgellm.conversion_checks import CHECK_PROMPT, check_artifact
from edgellm.conversion_manifest import code_entry, describe, measured_changes
from edgellm.conversion_resuming import resume_key
from edgellm.encoders.finding import find_encoder
from edgellm.errors import UsageError
from edgellm.export.writer import StagedFolder, check_output
from edgellm.hardware import peak_memory_bytes
from edgellm.hub.circumstances import run_notes
from edgellm.made import note_made
from edgellm.manifest import MANIFEST, Manifest
from edgellm.parallel import one_blas_thread
from edgellm.plan import Plan, check_apart, check_disk, make_plan
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant import SOLVERS
from edgellm.recipe import Recipe
from edgellm.slabs import Solve, write_tensors
from edgellm.tensors import Array
from edgellm.tune.settings import Tuned

if TYPE_CHECKING:
    from edgellm.remote.answering import CodeAnswers
    from edgellm.tune.coupling import RowCoupling


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
    ran = code_entry(plan.source, theirs)
    with StagedFolder(out, force=force, resume_key=resume_key(plan)) as staged:
        for name, nbytes in plan.layout.data_files.items():
            staged.create_data_file(name, nbytes)
        for name, content in plan.layout.files.items():
            if name in plan.layout.data_files:
                staged.write_at(name, 0, content)
            else:
                staged.write_file(name, content)
        coupling = couple_rows(plan, staged, progress)
        with one_blas_thread():
            outcome = quantize_tensors(plan, staged, progress, coupling)
        del coupling
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


def couple_rows(
    plan: Plan, staged: StagedFolder, progress: Progress = unwatched
) -> RowCoupling | None:
    """What couples rows for the solver, where the plan says so and there is a block to solve."""
    if plan.tuning is None or not plan.tuning.settings.gradient_tokens:
        return None
    assert plan.calibration is not None
    solved = sum("block" in entry for entry in staged.journal.entries())
    if solved == len(plan.calibration.blocks):
        return None
    from edgellm.tune.coupling import row_coupling  # brings torch with it

    folding = plan.calibration.folding
    assert not isinstance(folding, Splitting)  # no plan has it with --tune
    return row_coupling(
        plan.layout, plan.source, staged.path, plan.tuning, plan.threads, progress, folding
    )


def quantize_tensors(
    plan: Plan,
    staged: StagedFolder,
    progress: Progress = unwatched,
    coupling: RowCoupling | None = None,
) -> Outcome:
    """Write every tensor of the plan: load, solve, pack and place one slab of rows at a time.

    With a calibration, block by block instead: ``round_in_blocks``; rows of one weight together
    where ``coupling`` has them.

    Raises ``TensorError`` naming a tensor that holds NaN, Inf, or more than its grid reaches.
    """
    calibration = plan.calibration
    if calibration is not None:
        return round_in_blocks(plan, calibration, staged, progress, coupling)
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
