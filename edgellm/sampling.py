"""From logits to the next token: greedy, or drawn from the likely ones."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.errors import GenerationError, UsageError

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]

FIRST_GUESS = 256
"""Candidates that top-p sorts first; where they do not hold enough probability, it takes more."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen.

    ``temperature`` 0 is greedy: the most likely token, the lowest id where two are equal. Filters
    are applied as transformers does: temperature, then ``top_k`` (0: off), ``top_p`` (1: off),
    ``min_p`` (0: off), each on what the one before left. ``repeat_penalty`` (1: off) divides the
    positive and multiplies the negative logits of the last ``repeat_window`` tokens, prompt
    included (None: of all tokens). The same ``seed`` and logits give the same tokens; None takes a
    fresh one, which the answer reports.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_window: int | None = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for a value out of its range."""
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
            ("repeat_penalty", self.repeat_penalty, self.repeat_penalty > 0, "above 0; 1 is off"),
            ("repeat_window", self.repeat_window, (self.repeat_window or 0) >= 0, "0 or more"),
            ("seed", self.seed, (self.seed or 0) >= 0, "0 or more"),
        )
        for name, value, good, allowed in checks:
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"{name} is {value}: choose {allowed}")


class Sampler:
    """Picks tokens one after the other; ``seed`` is the one in use."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def pick(self, logits: Logits, recent: Sequence[int]) -> int:
        """The next token; ``logits`` ``[vocab]``, ``recent`` the tokens so far, oldest first.

        Raises ``GenerationError`` when the logits hold NaN, or no finite value.
        """
        penalized = self._penalized(logits, recent)
        if self.options.temperature == 0:
            best = int(penalized.argmax())
            _check_best(penalized[best])
            return best
        ids, probabilities = self._candidates(penalized)
        reach = np.cumsum(probabilities)
        drawn = int(np.searchsorted(reach, self._random.random() * reach[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def candidates(self, logits: Logits, recent: Sequence[int]) -> tuple[TokenIds, Probabilities]:
        """The tokens that ``pick`` draws from and their probabilities, which add up to 1."""
        return self._candidates(self._penalized(logits, recent))

    def _penalized(self, logits: Logits, recent: Sequence[int]) -> Logits:
        penalty, window = self.options.repeat_penalty, self.options.repeat_window
        if penalty == 1 or not recent or window == 0:
            return logits
        seen = np.unique(np.asarray(recent if window is None else recent[-window:], dtype=np.int64))
        changed = logits.copy()
        values = changed[seen]
        changed[seen] = np.where(values > 0, values / penalty, values * penalty)
        return changed

    def _candidates(self, logits: Logits) -> tuple[TokenIds, Probabilities]:
        options = self.options
        best = logits[logits.argmax()]
        _check_best(best)
        if options.temperature == 0:
            return np.array([logits.argmax()]), np.ones(1)
        limited = 0 < options.top_k < len(logits)
        if limited:
            ids = _largest(logits, options.top_k)
        elif options.top_p < 1:
            ids = _nucleus(logits, options.temperature, options.top_p, float(best))
        else:
            ids = np.arange(len(logits))
        weights = np.exp((logits[ids].astype(np.float64) - best) / options.temperature)
        if limited and options.top_p < 1:  # the ids are in falling order
            before = np.cumsum(weights) - weights
            keep = before < options.top_p * weights.sum()
            ids, weights = ids[keep], weights[keep]
        if options.min_p > 0:
            keep = weights >= options.min_p  # relative to the best token, whose weight is 1
            ids, weights = ids[keep], weights[keep]
        return ids, weights / weights.sum()


def _check_best(best: np.float32) -> None:
    # argmax stops at a NaN, so looking at one value looks at all of them.
    if not np.isfinite(best):
        raise GenerationError(
            f"the model gave {best} for its best next token: its weights are damaged, or the "
            "runtime overflowed. Check the model with `edgellm verify`, or try another --runtime"
        )


def _largest(logits: Logits, count: int) -> TokenIds:
    """Ids of the ``count`` largest logits in falling order, the lower id first among equals."""
    ids = np.argpartition(logits, len(logits) - count)[-count:]
    edge = logits[ids].min()
    above = np.flatnonzero(logits > edge)
    level = np.flatnonzero(logits == edge)[: count - len(above)]
    ids = np.concatenate([above, level])
    return ids[np.argsort(-logits[ids], kind="stable")]


def _nucleus(logits: Logits, temperature: float, top_p: float, best: float) -> TokenIds:
    """The fewest ids, most likely first, that hold ``top_p`` of the probability.

    Nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    scale = np.float32(1 / temperature)
    total = float(np.exp((logits - np.float32(best)) * scale).sum(dtype=np.float64))
    count = FIRST_GUESS
    while True:
        ids = _largest(logits, count) if count < len(logits) else np.argsort(-logits, kind="stable")
        weights = np.exp((logits[ids].astype(np.float64) - best) / temperature)
        before = np.cumsum(weights) - weights
        inside = before < top_p * total
        if count >= len(logits) or not inside[-1]:
            return ids[inside]
        count *= 8
