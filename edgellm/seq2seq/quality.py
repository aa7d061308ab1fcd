"""How far the answers of a rounded encoder with a decoder are from the float one's, over texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.artifact import Artifact
from edgellm.encoders.planning import FolderPlan
from edgellm.encoders.quality import CHECK_TEXT, affordable, built_in_texts
from edgellm.errors import GenerationError, RuntimeMissing, VerificationError
from edgellm.export.seq2seq_onnx import DECODER_FILE, ENCODER_FILE, lay_out_seq2seq
from edgellm.export.writer import StagedFolder
from edgellm.parallel import one_blas_thread
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.rtn import solve
from edgellm.runtimes.ort_seq2seq import OnnxSeq2Seq
from edgellm.runtimes.session import Logits
from edgellm.sampling import Sampler, SamplingOptions
from edgellm.seq2seq.model import Seq2SeqModel, open_seq2seq
from edgellm.slabs import write_tensors
from edgellm.source.encoder_model import Seq2SeqSource

ANSWER_TOKENS = 16
"""Of an answer that are compared."""

STEP_TOKENS = 4
"""Tokens of a text that take as long as one of an answer."""

CHECK_TOKENS = 8


class Seq2SeqQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The answers of an artifact against those of its source in float.

    Both are given the text and the source's likeliest answer, token by token: ``kld_mean`` is the
    KL divergence of what they say comes next, in nats a token, ``top1_agreement`` how often they
    find the same token likeliest.
    """

    texts: int
    tokens: int
    kld_mean: float
    kld_max: float
    top1_agreement: float
    text: str = "builtin"
    runtime: str = "onnxruntime"
    evaluate_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Answered:
    """A text, its answer, and the logits before each of the answer's tokens."""

    text_ids: tuple[int, ...]
    answer: tuple[int, ...]
    logits: Logits


def check_seq2seq(
    plan: FolderPlan[Seq2SeqSource], made: Artifact, progress: Progress = unwatched
) -> dict[str, dict[str, Any]]:
    """``check`` and ``quality`` of an artifact that ``plan`` led to, for its manifest.

    Without onnxruntime, ``skipped`` says so. Raises ``VerificationError`` for one that does not
    run.
    """
    progress(ProgressEvent("check", CHECK_TEXT, 0, 0))
    try:
        with open_seq2seq(made.path, verify=False, threads=plan.threads) as model:
            answer = model.generate(
                CHECK_TEXT, max_tokens=min(CHECK_TOKENS, model.facts.max_tokens)
            )
            found: dict[str, dict[str, Any]] = {
                "check": {
                    "prompt": CHECK_TEXT,
                    "text": f" -> {answer.text}",
                    "token_ids": list(answer.token_ids),
                    "runtime": "onnxruntime",
                }
            }
            if any(tensor.grid.name != "f32" for tensor in plan.layout.tensors):
                found["quality"] = _quality(plan, model, made.path, progress)
    except RuntimeMissing as error:
        return {"check": {"skipped": str(error)}}
    except GenerationError as error:
        raise VerificationError(
            f"what was made does not run, and is not kept (--no-check would): {error}"
        ) from error
    return found


def _quality(
    plan: FolderPlan[Seq2SeqSource], model: Seq2SeqModel, place: Path, progress: Progress
) -> dict[str, Any]:
    started = time.perf_counter()
    longest = model.facts.max_tokens
    texts = [
        model.tokenizer.encode_whole(text, max_tokens=longest).ids for text in built_in_texts()
    ]
    parameters = sum(ref.size for ref in plan.source.tensors.values())
    # An answer's tokens are computed one by one, each of which takes as long as a few of a text.
    lengths = [len(ids) + STEP_TOKENS * ANSWER_TOKENS for ids in texts]
    texts = texts[: affordable(lengths, parameters)]
    # In the folder that is being made, which a later run removes if this one is killed.
    with TemporaryDirectory(prefix=".float-", dir=place) as folder:
        exact = _float_answers(plan, model, texts, Path(folder) / "float", progress)
    divergences: list[float] = []
    same = 0
    for each in exact:
        model.graphs.read(each.text_ids)
        logits = model.graphs.step([model.facts.start_token_id, *each.answer[:-1]])
        divergences += list(_divergences(each.logits, logits))
        same += int((logits.argmax(axis=1) == each.logits.argmax(axis=1)).sum())
    quality = Seq2SeqQuality(
        texts=len(texts),
        tokens=len(divergences),
        kld_mean=float(np.mean(divergences)),
        kld_max=float(np.max(divergences)),
        top1_agreement=same / len(divergences),
        evaluate_s=round(time.perf_counter() - started, 3),
    )
    facts: dict[str, Any] = msgspec.to_builtins(quality)
    return facts


def _float_answers(
    plan: FolderPlan[Seq2SeqSource],
    model: Seq2SeqModel,
    texts: Sequence[tuple[int, ...]],
    folder: Path,
    progress: Progress,
) -> list[_Answered]:
    """The source's likeliest answers, computed in float."""
    write_float(plan, folder)
    graphs = OnnxSeq2Seq(folder / ENCODER_FILE, folder / DECODER_FILE, threads=plan.threads)
    room = min(ANSWER_TOKENS, model.facts.max_tokens)
    # What is forced says nothing of the model.
    facts = msgspec.structs.replace(model.facts, last_token_id=None)
    answers = []
    with Seq2SeqModel(graphs, model.tokenizer, facts) as reference:
        for number, ids in enumerate(texts):
            sampler = Sampler(SamplingOptions())
            answer = tuple(reference.tokens(ids, max_tokens=room, sampler=sampler))
            graphs.read(ids)
            logits = graphs.step([model.facts.start_token_id, *answer[:-1]])
            answers.append(_Answered(ids, answer, logits))
            progress(ProgressEvent("evaluate", "texts", 0, 0, number + 1, len(texts)))
    return answers


def write_float(plan: FolderPlan[Seq2SeqSource], folder: Path) -> None:
    """The same model with its weights as they are, in ``folder``."""
    recipe = msgspec.structs.replace(
        plan.recipe, quant="f32", embed=None, head=None, tensor_grids={}
    )
    layout = lay_out_seq2seq(plan.source, recipe)
    with StagedFolder(folder) as staged, one_blas_thread():
        for name, nbytes in layout.data_files.items():
            staged.create_data_file(name, nbytes)
        for name in (ENCODER_FILE, DECODER_FILE):
            staged.write_file(name, layout.files[name])
        write_tensors(layout.tensors, solve, plan.threads, staged)
        staged.sync()
        staged.commit()


def _divergences(exact: Logits, rounded: Logits) -> npt.NDArray[np.float64]:
    """KL of each row of ``rounded`` logits ``[tokens, vocab]`` to that of ``exact``, in nats."""
    logs = [_log_softmax(each.astype(np.float64)) for each in (exact, rounded)]
    found: npt.NDArray[np.float64] = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    return np.maximum(found, 0.0)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def quality_line(found: dict[str, Any]) -> str:
    """What a manifest's ``measured.quality`` says of such a model, in one line."""
    return (
        f"KL {found['kld_mean']:.3g} nats to the source, top-1 {found['top1_agreement']:.0%} "
        f"({found['tokens']:,} tokens of answers to {found['texts']} texts)"
    )
