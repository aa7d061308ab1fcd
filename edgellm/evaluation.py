"""How well a model predicts a text, and how far its answers are from another's, from logits.

Whoever computed them: a ``Session`` of some runtime (``session_logits``) or the float network
(``forward.window_logits``), one window of text at a time. Sums are in float64. Figures are defined
as llama-perplexity defines them (llama.cpp, tools/perplexity: ``perplexity``, ``kl_divergence``):
its KL leaves tokens out that the reference gives less than e^-16, and its reference is rounded to
16 bits; nothing is left out or rounded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.errors import GenerationError

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


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured over ``tokens`` tokens of a text, each given those before it in its window.

    ``perplexity`` is exp of the mean surprise a token, ``word_perplexity`` and ``byte_perplexity``
    of the same sum by the words and bytes of the scored text, which do not depend on a tokenizer.
    Against a reference, None without one: ``kld_*`` of KL(reference || model) in nats,
    ``top1_agreement`` the share of tokens where both find the same one most likely,
    ``rms_delta_p`` the root mean square of the change in the probability of the text's own token
    and ``mean_delta_p`` its mean (below 0: worse), and ``perplexity_increase`` the share by which
    the reference's perplexity is exceeded. ``*_stderr`` are standard errors, the tokens taken as
    independent; those of ratios heed that both models saw the same tokens.
    """

    tokens: int
    words: int
    text_bytes: int
    perplexity: float
    perplexity_stderr: float | None
    word_perplexity: float | None
    word_perplexity_stderr: float | None
    byte_perplexity: float | None
    byte_perplexity_stderr: float | None
    bits_per_byte: float | None
    reference_perplexity: float | None = None
    reference_perplexity_stderr: float | None = None
    perplexity_increase: float | None = None
    perplexity_increase_stderr: float | None = None
    kld_mean: float | None = None
    kld_mean_stderr: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    mean_delta_p: float | None = None
    mean_delta_p_stderr: float | None = None
    rms_delta_p: float | None = None
    rms_delta_p_stderr: float | None = None


class Comparison:
    """Adds up figures window by window; a few numbers a token stay in memory, no logits."""

    def __init__(self) -> None:
        self._kl: list[Doubles] = []
        self._agreeing: list[npt.NDArray[np.bool_]] = []
        self._surprise: list[Doubles] = []
        self._reference_surprise: list[Doubles] = []
        self._followed: list[npt.NDArray[np.bool_]] = []

    def add(
        self,
        reference: Logits | None,
        other: Logits,
        window: Sequence[int],
        first: int = 0,
    ) -> None:
        """Count the tokens of a window from place ``first`` on.

        Logits are ``[len(window) - first, vocab]``, from each model; no ``reference`` for all
        windows or for none. Of different vocabularies the tokens that both have are compared: what
        one of them gives to the others counts as if it had not (added tokens, rows of padding).
        Raises ``GenerationError`` for logits that are not finite.
        """
        places = len(window) - first
        vocab = other.shape[1] if reference is None else min(reference.shape[1], other.shape[1])
        step = max(1, CHUNK_VALUES // vocab)
        for start in range(0, places, step):
            stop = min(start + step, places)
            following = np.asarray(window[first + start + 1 : first + stop + 1], np.intp)
            self._followed.append(np.arange(stop - start) < len(following))
            theirs = _Softmax(other[start:stop, :vocab])
            self._surprise.append(theirs.surprise(following))
            if reference is not None:
                ours = _Softmax(reference[start:stop, :vocab])
                self._reference_surprise.append(ours.surprise(following))
                self._agreeing.append(ours.likeliest == theirs.likeliest)
                self._kl.append(ours.divergence(theirs))
            found = [self._surprise[-1], *(part[-1] for part in (self._kl,) if part)]
            if not all(np.isfinite(values).all() for values in found):
                raise GenerationError(
                    f"the logits at tokens {first + start} to {first + stop - 1} of a window are "
                    "not finite: the model is damaged, or its runtime overflows (edgellm verify)"
                )

    def result(self) -> Divergence:
        """The divergence over all places so far, the last of each window too; there must be one."""
        kl = np.concatenate(self._kl)
        error = _standard_error(kl)
        sides = (self._reference_surprise, self._surprise)
        perplexities = [
            _exp(values.mean()) if values.size else None
            for values in map(self._where_followed, sides)
        ]
        return Divergence(
            kl=float(kl.mean()),
            kl_error=math.nan if error is None else error,
            top1_agreement=float(np.concatenate(self._agreeing).mean()),
            reference_perplexity=perplexities[0],
            perplexity=perplexities[1],
            tokens=kl.size,
        )

    def figures(self, words: int, text_bytes: int) -> Figures:
        """The figures over all tokens that follow a place; there must be one.

        ``words`` and ``text_bytes`` are those of the tokens that were predicted.
        """
        surprise = self._where_followed(self._surprise)
        alone = _perplexities(surprise, words, text_bytes)
        if not self._kl:
            return Figures(tokens=surprise.size, words=words, text_bytes=text_bytes, **alone)
        before = self._where_followed(self._reference_surprise)
        kl = self._where_followed(self._kl)
        agreement = float(self._where_followed(self._agreeing).mean())
        delta_p = np.exp(-surprise) - np.exp(-before)
        rms = math.sqrt(float(np.square(delta_p).mean()))
        rms_stderr = _standard_error(np.square(delta_p))
        ratio = _exp((surprise - before).mean())
        return Figures(
            tokens=surprise.size,
            words=words,
            text_bytes=text_bytes,
            **alone,
            reference_perplexity=_exp(before.mean()),
            reference_perplexity_stderr=_scaled(_exp(before.mean()), _standard_error(before)),
            perplexity_increase=ratio - 1,
            perplexity_increase_stderr=_scaled(ratio, _standard_error(surprise - before)),
            kld_mean=float(kl.mean()),
            kld_mean_stderr=_standard_error(kl),
            kld_median=float(np.median(kl)),
            kld_p99=float(np.quantile(kl, 0.99)),
            kld_max=float(kl.max()),
            top1_agreement=agreement,
            top1_agreement_stderr=(
                math.sqrt(agreement * (1 - agreement) / (kl.size - 1)) if kl.size > 1 else None
            ),
            mean_delta_p=float(delta_p.mean()),
            mean_delta_p_stderr=_standard_error(delta_p),
            rms_delta_p=rms,
            rms_delta_p_stderr=_scaled(0.5 / rms, rms_stderr) if rms else rms_stderr,
        )

    def _where_followed(self, parts: Sequence[npt.NDArray[np.generic]]) -> Doubles:
        """``parts`` in one, without the places that no token of the text follows."""
        values: Doubles = np.concatenate(parts)[np.concatenate(self._followed)].astype(np.float64)
        return values


class _Softmax:
    """Probabilities of ``[tokens, vocab]`` logits, as numerators that were not divided yet."""

    def __init__(self, logits: Logits) -> None:
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        self.shifted = shifted
        self.numerators: Doubles = np.exp(shifted)
        self.sums: Doubles = self.numerators.sum(axis=1)
        self.likeliest = shifted.argmax(axis=1)

    def surprise(self, following: npt.NDArray[np.intp]) -> Doubles:
        """``-log p`` of each token of ``following``; 0 at places behind its end."""
        surprise = np.zeros(len(self.sums))
        places = np.arange(len(following))
        surprise[places] = np.log(self.sums[places]) - self.shifted[places, following]
        return surprise

    def divergence(self, other: _Softmax) -> Doubles:
        """KL(self || other) of each token, in nats: sum of p (log p - log q)."""
        gained = np.einsum("ij,ij->i", self.numerators, self.shifted - other.shifted) / self.sums
        divergence: Doubles = gained + np.log(other.sums) - np.log(self.sums)
        return divergence


def compare(reference: Iterable[Logits], other: Iterable[Logits], windows: Windows) -> Divergence:
    """How far ``other`` is from ``reference``; one ``[tokens, vocab]`` of each for every window."""
    comparison = Comparison()
    for ours, theirs, window in zip(reference, other, windows, strict=True):
        comparison.add(ours, theirs, window)
    return comparison.result()


def session_logits(
    session: Session, windows: Windows, firsts: Sequence[int] | None = None
) -> Iterator[Logits]:
    """Logits of one window after another, each from an empty cache.

    ``[tokens - first, vocab]``: from place ``first`` of its window on, 0 where ``firsts`` is None.
    Raises ``GenerationError`` as the session does: a window may be too long for its context.
    """
    for window, first in zip(windows, firsts or [0] * len(windows), strict=True):
        session.trim(0)
        if first:
            session.prefill(window[:first])
        yield session.prefill(window[first:], all_logits=True)
    session.trim(0)


def _perplexities(surprise: Doubles, words: int, text_bytes: int) -> dict[str, Any]:
    """The perplexities of tokens by token, word and byte, with their standard errors."""
    found: dict[str, Any] = {}
    stderr = _standard_error(surprise)
    for name, units in (("", surprise.size), ("word_", words), ("byte_", text_bytes)):
        tokens_per_unit = surprise.size / units if units else math.nan
        value = _exp(surprise.mean() * tokens_per_unit) if units else None
        found[f"{name}perplexity"] = value
        spread = None if value is None else _scaled(value * tokens_per_unit, stderr)
        found[f"{name}perplexity_stderr"] = spread
    bits = float(surprise.sum()) / math.log(2) / text_bytes if text_bytes else None
    return {**found, "bits_per_byte": bits}


def _standard_error(values: Doubles) -> float | None:
    """Of the mean of independent ``values``; None of a single one."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None


def _scaled(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
