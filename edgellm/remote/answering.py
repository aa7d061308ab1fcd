"""A model's answers by its own Python, and whether edgellm reads it as that computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.calibration.texts import evaluation_windows
from edgellm.errors import GenerationError, SourceError, VerificationError
from edgellm.evaluation import Logits
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.remote.finding import MODEL, OPTION
from edgellm.remote.loading import LOADING_ERRORS, load_model

if TYPE_CHECKING:
    from edgellm.evaluation_text import Passage, TextTokenizer
    from edgellm.source import ModelSource

RUNTIME: Final = "the model's own Python"

TOKENS, WINDOW = 192, 96
"""Of the built-in text that both are asked of; a misread rope or norm shows from the start."""

MOST_ERROR: Final = 0.01
"""Of the logits' spread. Float32 on either side comes to 1e-5, a misread setting to 0.1 or
more."""


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """How near edgellm's float network is to the model's own Python, over ``tokens`` of a text.

    ``logit_error``: root mean square of what lies between their logits (less what all of one token
    share, which no answer depends on), by the standard deviation of the Python's.
    """

    tokens: int
    logit_error: float
    top1_agreement: float


class CodeAnswers:
    """The answers of a source's own Python, which transformers runs in float32.

    All of the model is in memory from when it is opened until ``close``, and again from when it is
    asked after that.
    """

    runtime = RUNTIME

    def __init__(self, source: ModelSource, *, threads: int | None = None) -> None:
        """Load it; raises what ``load_model`` raises."""
        self._source = source
        self._model: Any = self._loaded()
        self.name = source.name
        self.context_tokens = source.decoder.context_length
        self.notes = source.notes
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    @property
    def tokenizer(self) -> TextTokenizer:
        tokenizer: Any = self._source.tokenizer
        return tokenizer  # type: ignore[no-any-return]

    @property
    def tokenizer_sha256(self) -> str:
        return self._source.tokenizer.sha256()

    def logits(self, passages: Sequence[Passage]) -> Iterator[Logits]:
        """As ``Answers``; raises ``GenerationError`` where the Python fails."""
        import torch

        if self._model is None:
            self._model = self._loaded()
        for passage in passages:
            try:
                with torch.inference_mode():
                    found = self._model(torch.tensor([list(passage.ids)]), use_cache=False)
                    logits: Logits = found.logits[0, passage.first :].float().numpy()
            except LOADING_ERRORS as error:
                raise GenerationError(
                    f"{RUNTIME} could not compute {len(passage.ids)} tokens "
                    f"({type(error).__name__}: {error}): leave {OPTION} out"
                ) from error
            yield np.ascontiguousarray(logits[:, : self._source.decoder.vocab_size])

    def close(self) -> None:
        """Give the memory back; what asks again loads it again."""
        self._model = None

    def _loaded(self) -> Any:
        assert self._source.code is not None
        return load_model(self._source.code)


def open_code_answers(
    source: ModelSource, *, threads: int | None = None
) -> tuple[CodeAnswers | None, str]:
    """The answers of the source's own Python; or why there are none, empty where none was trusted.

    Raises ``RuntimeMissing`` without transformers, ``SourceError`` for Python that is not there.
    """
    code = source.code
    if code is None:
        return None, ""
    if MODEL not in code.classes:
        return None, f"its Python ({code.listed}) names no {MODEL}"
    if source.merge is not None:
        return None, "adapters are merged into it, which its Python knows nothing of"
    code.digests()
    try:
        return CodeAnswers(source, threads=threads), ""
    except SourceError as error:
        return None, str(error)


def prove_reading(
    source: ModelSource, theirs: CodeAnswers, *, threads: int, progress: Progress = unwatched
) -> Read:
    """That edgellm's float network of ``source`` answers as ``theirs``, the model's own Python.

    Raises ``VerificationError`` where it does not: the family is not what it is read as.
    """
    from edgellm.answers import FloatAnswers
    from edgellm.evaluation_text import Passage

    progress(ProgressEvent("reference", RUNTIME, 0, 0))
    room = min(WINDOW, source.decoder.context_length)
    text = evaluation_windows(source.tokenizer, None, tokens=TOKENS, context=room)
    passages = [Passage(ids, 0) for ids in text.windows]
    errors: list[npt.NDArray[np.float64]] = []
    spreads: list[npt.NDArray[np.float64]] = []
    same: list[npt.NDArray[np.bool_]] = []
    with closing(FloatAnswers(source, threads=threads)) as ours:
        for found, wanted in zip(ours.logits(passages), theirs.logits(passages), strict=True):
            errors.append(_centred(found - wanted))
            spreads.append(_centred(wanted))
            same.append(found.argmax(axis=1) == wanted.argmax(axis=1))
    error = _root_mean_square(errors) / _root_mean_square(spreads)
    agreement = float(np.concatenate(same).mean())
    tokens = sum(len(each) for each in same)
    if not error <= MOST_ERROR:
        raise VerificationError(
            f"read as {source.family.architecture}, the model answers otherwise than by its own "
            f"Python (logits {error:.2g} of their spread apart, top-1 {agreement:.0%} over "
            f"{tokens} tokens): it computes something else, and converting it would give another "
            "model"
        )
    return Read(tokens=tokens, logit_error=error, top1_agreement=agreement)


def _centred(logits: Logits) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    found: npt.NDArray[np.float64] = wide - wide.mean(axis=1, keepdims=True)
    return found


def _root_mean_square(parts: Sequence[npt.NDArray[np.float64]]) -> float:
    total = sum(float(np.square(each).sum()) for each in parts)
    return math.sqrt(total / sum(each.size for each in parts))
