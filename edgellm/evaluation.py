"""How far one model's answers are from another's: KL divergence, perplexity, agreement.

Everything is taken from logits, whoever computed them: a ``Session`` of some runtime
(``session_logits``) or the float network (``forward.window_logits``), one window of text at a time.
Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgellm.forward import Windows
    from edgellm.runtimes.session import Session

Logits = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

CHUNK_VALUES = 1 << 20
"""Logits that are widened to float64 at once: 8 MiB, whatever the vocabulary."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """How far the answers of one model, the other, are from those of another, the reference.

    ``kl`` is the mean over ``tokens`` positions of KL(reference || other) in nats, ``kl_error`` its
    standard error. ``top1_agreement`` is the share of positions where both find the same token most
    likely. The perplexities are of the tokens that follow in the text, where one follows; None
    where none does.
    """

    kl: float
    kl_error: float
    top1_agreement: float
    reference_perplexity: float | None
    perplexity: float | None
    tokens: int


class Comparison:
    """Adds up a ``Divergence`` window by window."""

    def __init__(self) -> None:
        self._kl: list[Doubles] = []
        self._agreeing = 0
        self._surprise = [0.0, 0.0]
        self._followed = 0

    def add(self, reference: Logits, other: Logits, window: Sequence[int]) -> None:
        """Count a window of tokens, whose logits are ``[tokens, vocab]`` from each model.

        Of different vocabularies the tokens that both have are compared: what one of them gives to
        the others counts as if it had not (added tokens, rows of padding).
        """
        vocab = min(reference.shape[1], other.shape[1])
        step = max(1, CHUNK_VALUES // vocab)
        for start in range(0, len(window), step):
            ours = log_softmax(reference[start : start + step, :vocab])
            theirs = log_softmax(other[start : start + step, :vocab])
            self._kl.append(kl_divergence(ours, theirs))
            self._agreeing += int(np.sum(ours.argmax(axis=1) == theirs.argmax(axis=1)))
            following = np.asarray(window[start + 1 : start + 1 + step], np.intp)
            places = np.arange(len(following))
            for side, found in enumerate((ours, theirs)):
                self._surprise[side] -= float(found[places, following].sum())
            self._followed += len(following)

    def result(self) -> Divergence:
        """The figures of all windows so far; there must be one."""
        kl = np.concatenate(self._kl)
        spread = float(kl.std(ddof=1)) if kl.size > 1 else math.nan
        perplexities = [
            math.exp(sum_ / self._followed) if self._followed else None for sum_ in self._surprise
        ]
        return Divergence(
            kl=float(kl.mean()),
            kl_error=spread / math.sqrt(kl.size),
            top1_agreement=self._agreeing / kl.size,
            reference_perplexity=perplexities[0],
            perplexity=perplexities[1],
            tokens=kl.size,
        )


def compare(reference: Iterable[Logits], other: Iterable[Logits], windows: Windows) -> Divergence:
    """How far ``other`` is from ``reference``; one ``[tokens, vocab]`` of each for every window."""
    comparison = Comparison()
    for ours, theirs, window in zip(reference, other, windows, strict=True):
        comparison.add(ours, theirs, window)
    return comparison.result()


def log_softmax(logits: Logits | Doubles) -> Doubles:
    """Natural logarithms of the probabilities ``[tokens, vocab]``, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(reference: Doubles, other: Doubles) -> Doubles:
    """KL(reference || other) ``[tokens]`` in nats, of log-probabilities ``[tokens, vocab]``."""
    divergence: Doubles = np.einsum("ij,ij->i", np.exp(reference), reference - other)
    return divergence


def session_logits(session: Session, windows: Windows) -> Iterator[Logits]:
    """Logits ``[tokens, vocab]`` of one window after another, each from an empty cache.

    Raises ``GenerationError`` as the session does: a window may be too long for its context.
    """
    for window in windows:
        session.trim(0)
        yield session.prefill(window, all_logits=True)
    session.trim(0)
