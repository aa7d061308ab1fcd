"""How far the outputs of a rounded encoder are from those of the float one, over built-in texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgellm.calibration.documents import Document, read_documents
from edgellm.calibration.texts import DATA, EVALUATION
from edgellm.digests import combined_sha256, file_sha256
from edgellm.encoders.model import BATCH, EncoderModel
from edgellm.errors import GenerationError, RuntimeMissing, VerificationError
from edgellm.export.encoder_onnx import lay_out_encoder
from edgellm.export.writer import StagedFolder
from edgellm.parallel import one_blas_thread
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.rtn import solve
from edgellm.runtimes.ort_encoder import OnnxEncoder, Values
from edgellm.slabs import write_tensors
from edgellm.tokenization.tokenizer import EncodedText

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.encoders.planning import EncoderPlan
    from edgellm.manifest import EncoderFacts

LENGTHS = (40, 160, 480)
"""Characters of the built-in texts, in turn: a title, a sentence, a paragraph."""

MOST_WORK = 3e11
"""Parameters times tokens that are compared: some seconds on two cores. Of a larger model fewer
texts are, but ``LEAST_TEXTS``."""

LEAST_TEXTS = 6
"""Two of each length."""

CHECK_TEXT = "The capital of France is"


class EncoderQuality(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outputs of an artifact against those of its source in float.

    ``cosine_mean`` and ``cosine_min`` are of the vectors of ``output``: embeddings, or logits of
    texts or of their tokens. ``max_difference``: the largest of any of their values, ``deviation``:
    its standard deviation by that of the float values. ``top1_agreement``: how often the likeliest
    label or word is the same; None for embeddings.
    """

    output: str
    texts: int
    vectors: int
    cosine_mean: float
    cosine_min: float
    max_difference: float
    deviation: float
    top1_agreement: float | None = None
    text: str = "builtin"
    corpus_sha256: str = ""
    runtime: str = "onnxruntime"
    evaluate_s: float = 0.0


def built_in_texts() -> list[str]:
    """Short and long texts, some of them of other languages and of code."""
    texts = []
    for number, document in enumerate(read_documents(_corpus())):
        text = " ".join(_words_of(document).split())
        texts.append(text[: LENGTHS[number % len(LENGTHS)]])
    return texts


def affordable(lengths: Sequence[int], parameters: int) -> int:
    """How many texts of so many tokens are compared of a model of so many parameters."""
    work = parameters * max(1, sum(lengths))
    return min(len(lengths), max(LEAST_TEXTS, int(len(lengths) * MOST_WORK / work)))


def _corpus() -> Path:
    return DATA / f"{EVALUATION}.jsonl"


def _words_of(document: Document) -> str:
    said = [str(message.get("content", "")) for message in document.messages]
    return " ".join([document.text, *said])


def check_runs(model: EncoderModel) -> dict[str, Any]:
    """What a new artifact makes of one text; raises ``VerificationError`` if not finite."""
    output = model.facts.outputs[0]
    (values,) = model.run([model.encode(CHECK_TEXT)], [output])
    if not np.isfinite(values).all():
        raise VerificationError(
            f"what was made gives {output} that is not finite, and is not kept (--no-check would): "
            "the source is damaged, or was trained into overflow"
        )
    shape = " x ".join(map(str, values.shape[1:]))
    return {"prompt": CHECK_TEXT, "text": f" ({output} of {shape})", "runtime": "onnxruntime"}


def check_encoder(
    plan: EncoderPlan, made: Artifact, progress: Progress = unwatched
) -> dict[str, dict[str, Any]]:
    """``check`` and ``quality`` of an artifact that ``plan`` led to, for its manifest.

    Without onnxruntime, ``skipped`` says so. Raises ``VerificationError`` for one that does not
    run.
    """
    from edgellm.encoders.model import open_encoder

    progress(ProgressEvent("check", CHECK_TEXT, 0, 0))
    try:
        with open_encoder(made.path, verify=False, threads=plan.threads) as model:
            found = {"check": check_runs(model)}
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
    plan: EncoderPlan, model: EncoderModel, place: Path, progress: Progress
) -> dict[str, Any]:
    started = time.perf_counter()
    encoded = [model.encode(text) for text in built_in_texts()]
    parameters = sum(ref.size for ref in plan.source.tensors.values())
    encoded = encoded[: affordable([len(each.ids) for each in encoded], parameters)]
    rounded = vectors_of(model, encoded, progress)
    # In the folder that is being made, which a later run removes if this one is killed.
    with TemporaryDirectory(prefix=".float-", dir=place) as folder:
        main = write_float(plan, Path(folder) / "float")
        graph = OnnxEncoder(main, threads=plan.threads)
        with EncoderModel(graph, model.tokenizer, model.facts) as reference:
            exact = vectors_of(reference, encoded, progress)
    quality = compared(model.facts, exact, rounded)
    corpus = _corpus()
    facts: dict[str, Any] = msgspec.to_builtins(
        msgspec.structs.replace(
            quality,
            texts=len(encoded),
            corpus_sha256=combined_sha256({corpus.name: file_sha256(corpus)}),
            evaluate_s=round(time.perf_counter() - started, 3),
        )
    )
    return facts


def write_float(plan: EncoderPlan, folder: Path) -> Path:
    """The same encoder with its weights as they are, in ``folder``; the file of its graph."""
    recipe = msgspec.structs.replace(
        plan.recipe, quant="f32", embed=None, head=None, tensor_grids={}
    )
    layout = lay_out_encoder(plan.source, recipe)
    with StagedFolder(folder) as staged, one_blas_thread():
        for name, nbytes in layout.data_files.items():
            staged.create_data_file(name, nbytes)
        staged.write_file(layout.main_file, layout.files[layout.main_file])
        write_tensors(layout.tensors, solve, plan.threads, staged)
        staged.sync()
        staged.commit()
    return folder / layout.main_file


def vectors_of(
    model: EncoderModel, encoded: Sequence[EncodedText], progress: Progress = unwatched
) -> Values:
    """The first output for every text, or for every token of it, float32 ``[vectors, width]``."""
    found: list[Values] = []
    for start in range(0, len(encoded), BATCH):
        batch = encoded[start : start + BATCH]
        (values,) = model.run(batch, model.facts.outputs[:1])
        if values.ndim == 2:
            found.append(values)
        else:
            found += [row[: len(each.ids)] for row, each in zip(values, batch, strict=True)]
        progress(ProgressEvent("evaluate", "texts", 0, 0, start + len(batch), len(encoded)))
    return np.concatenate(found)


def compared(facts: EncoderFacts, exact: Values, rounded: Values) -> EncoderQuality:
    """The figures of ``rounded`` vectors against ``exact`` ones, both ``[vectors, width]``."""
    a, b = exact.astype(np.float64), rounded.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    spread = float(a.std())
    same = float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    return EncoderQuality(
        output=facts.outputs[0],
        texts=len(a),
        vectors=len(a),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        max_difference=float(np.abs(a - b).max()),
        deviation=float((a - b).std()) / spread if spread else 0.0,
        top1_agreement=None if facts.task == "embeddings" else same,
    )


def quality_line(found: dict[str, Any]) -> str:
    """What a manifest's ``measured.quality`` says of an encoder, in one line."""
    agreement = found.get("top1_agreement")
    same = "" if agreement is None else f", the same answer in {agreement:.0%}"
    return (
        f"cosine to the source {found['cosine_mean']:.5f} on average, {found['cosine_min']:.5f} at "
        f"least{same}, values off by up to {found['max_difference']:.3g} ({found['output']} of "
        f"{found['texts']} texts)"
    )
