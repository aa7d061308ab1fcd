"""Evaluate: a model, and a reference beside it, over one text, window by window.

Both compute a window, it is scored, and its logits are forgotten: memory is that of two windows of
the vocabulary beside the models, whatever the text.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import repeat
from os import PathLike

import msgspec

from edgellm.answers import Answers, context_length, open_answers
from edgellm.calibration import BUILT_IN
from edgellm.errors import UsageError
from edgellm.evaluation import Comparison, Figures, Logits
from edgellm.evaluation_text import (
    WINDOW_TOKENS,
    Corpus,
    Cut,
    Passage,
    Score,
    begin_ids,
    corpus_named,
    cut,
    scored_text,
)
from edgellm.progress import Progress, ProgressEvent, unwatched


class Evaluation(Figures, frozen=True, kw_only=True):
    """The figures of a model over a text, with everything that they depend on.

    ``scored`` says in words which tokens of the text. ``corpus_sha256`` is the digest of the text's
    file, ``windows_sha256`` of the token ids and which of them are scored: figures of the same one
    can be compared. ``reference`` is None where there was none.
    """

    path: str
    runtime: str
    reference: str | None
    reference_runtime: str | None
    text: str
    corpus_sha256: str
    tokenizer_sha256: str
    windows_sha256: str
    scored: str
    window_count: int
    window_tokens: int
    vocab_size: int
    evaluate_s: float
    notes: tuple[str, ...] = ()


def evaluate(
    path: str | PathLike[str],
    text: str | PathLike[str] = BUILT_IN,
    *,
    reference: str | PathLike[str] | None = None,
    tokens: int | None = None,
    window_tokens: int | None = None,
    score: Score | None = None,
    runtime: str | None = None,
    reference_runtime: str | None = None,
    threads: int | None = None,
    ignore_config_keys: Collection[str] = (),
    progress: Progress = unwatched,
) -> Evaluation:
    """How well the model at ``path`` predicts ``text``, and how far it is from ``reference``.

    Both are artifacts, GGUF files, Hugging Face folders or Hub ids (``answers.open_answers``);
    ``text`` is a file or ``builtin``. At most ``tokens`` are scored, in windows of
    ``window_tokens`` (None: 512, or the models' context where that is less). Raises ``UsageError``
    for a text that cannot be scored and for models that split it differently, and what opening and
    computing raise.
    """
    started = time.perf_counter()
    corpus = corpus_named(str(text))
    asked = [(str(path), runtime)]
    if reference is not None:
        asked.append((str(reference), reference_runtime))
    elif reference_runtime is not None:
        raise UsageError("a runtime of the reference is named, and no reference: name one too")
    room = window_tokens or WINDOW_TOKENS
    for one, its_runtime in asked:
        room = _fitting(room, window_tokens, one, context_length(one, its_runtime))
    with ExitStack() as stack:
        opened: list[Answers] = []
        for one, its_runtime in asked:
            found = open_answers(
                one,
                runtime=its_runtime,
                context_tokens=room,
                threads=threads,
                ignore_config_keys=ignore_config_keys,
                progress=progress,
            )
            opened.append(stack.enter_context(closing(found)))
            room = _fitting(room, window_tokens, one, found.context_tokens)
        pieces = cut(corpus, opened[0].tokenizer, window_tokens=room, score=score, tokens=tokens)
        if len(opened) > 1:
            check_same_tokens(corpus, pieces, opened[0], opened[1], tokens=tokens)
        comparison, vocab_size = compared(opened, pieces, progress)
        words, text_bytes = scored_text(opened[0].tokenizer, pieces.passages)
        notes = tuple(dict.fromkeys(note for answers in opened for note in answers.notes))
        figures = comparison.figures(words, text_bytes)
        return Evaluation(
            **msgspec.structs.asdict(figures),
            path=str(path),
            runtime=opened[0].runtime,
            reference=None if reference is None else str(reference),
            reference_runtime=opened[1].runtime if len(opened) > 1 else None,
            text=corpus.name,
            corpus_sha256=corpus.sha256,
            tokenizer_sha256=opened[0].tokenizer_sha256,
            windows_sha256=pieces.sha256(),
            scored=pieces.description,
            window_count=len(pieces.passages),
            window_tokens=pieces.window_tokens,
            vocab_size=vocab_size,
            evaluate_s=round(time.perf_counter() - started, 3),
            notes=notes,
        )


def check_same_tokens(
    corpus: Corpus, pieces: Cut, ours: Answers, theirs: Answers, *, tokens: int | None = None
) -> None:
    """Raise ``UsageError`` unless both split ``corpus`` into the same token ids.

    The probabilities of two models can be compared where they are of the same tokens.
    """
    advice = (
        "their answers cannot be compared token by token: evaluate each alone, and compare "
        "word_perplexity or byte_perplexity"
    )
    begins = [begin_ids(answers.tokenizer) for answers in (ours, theirs)]
    if begins[0] != begins[1]:
        without = theirs.name if begins[0] else ours.name
        raise UsageError(
            f"{ours.name} and {theirs.name} have different tokenizers: {without} begins a text "
            f"without the token {(begins[0] or begins[1])[0]} that the other begins it with, or "
            f"with another one. {advice.capitalize()}"
        )
    other = cut(
        corpus,
        theirs.tokenizer,
        window_tokens=pieces.window_tokens,
        score=pieces.score,
        tokens=tokens,
    )
    for number, (mine, yours) in enumerate(zip(pieces.passages, other.passages, strict=False)):
        if mine == yours:
            continue
        place = _first_difference(mine, yours)
        sides = [
            repr(answers.tokenizer.decode(passage.ids[max(0, place - 3) : place + 3]))
            for answers, passage in ((ours, mine), (theirs, yours))
        ]
        raise UsageError(
            f"{ours.name} and {theirs.name} have different tokenizers: they split {corpus.name} "
            f"differently from token {place} of window {number} on ({sides[0]} and {sides[1]}). "
            f"{advice.capitalize()}"
        )
    if len(pieces.passages) != len(other.passages):
        raise UsageError(
            f"{ours.name} and {theirs.name} have different tokenizers: they split {corpus.name} "
            f"into {len(pieces.passages)} and {len(other.passages)} windows. {advice.capitalize()}"
        )


def compared(
    opened: Sequence[Answers], pieces: Cut, progress: Progress = unwatched
) -> tuple[Comparison, int]:
    """The figures of the first of ``opened``, against the second where there is one, added up.

    And the size of the vocabulary that was compared.
    """
    comparison, vocab_size = Comparison(), 0
    model, reference = opened[0], opened[1] if len(opened) > 1 else None
    ours = model.logits(pieces.passages)
    theirs: Iterator[Logits | None] = (
        repeat(None) if reference is None else iter(reference.logits(pieces.passages))
    )
    for done, passage in enumerate(pieces.passages, 1):
        before, after = next(theirs), next(ours)  # the float network first: it speaks of layers
        comparison.add(before, after, passage.ids, passage.first)
        vocab_size = min(after.shape[1], after.shape[1] if before is None else before.shape[1])
        progress(ProgressEvent("evaluate", "windows", 0, 0, done, len(pieces.passages)))
    return comparison, vocab_size


def _first_difference(mine: Passage, yours: Passage) -> int:
    pairs = zip(mine.ids, yours.ids, strict=False)
    differing = (place for place, (left, right) in enumerate(pairs) if left != right)
    return next(differing, min(len(mine.ids), len(yours.ids)))


def _fitting(room: int, asked: int | None, path: str, context: int | None) -> int:
    """``room`` for a window, or what ``path`` takes where that is less; None: not known yet."""
    if context is None or context >= room:
        return room
    if asked is not None:
        raise UsageError(
            f"a window of {asked} tokens is longer than the context of {path}, {context} tokens: "
            "choose a shorter --window"
        )
    return context
