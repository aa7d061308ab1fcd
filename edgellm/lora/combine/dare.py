"""DARE: random values are dropped and the rest is scaled up, so that the expected sum stays.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch" (2023), section 3.2; arXiv:2311.03099.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edgellm.lora.combine.pruning import Mask
from edgellm.tensors import Array

Factor = Literal["a", "b", "delta"]
"""What is masked: ``LowRank``'s ``a`` ``[rank, in]`` or ``b`` ``[out, rank]``, or their product."""

DRAWS_A_STEP = 8
"""Numbers of 32 bits that one step of Philox's counter gives."""


@dataclass(frozen=True, slots=True)
class Masked:
    """The tensor that a mask is for: of the ``adapter``-th adapter, for the weight ``target``."""

    adapter: int
    target: str
    factor: Factor
    columns: int


class Masks(Protocol):
    """Where the random masks come from."""

    def keep(self, masked: Masked, start: int, stop: int, density: float) -> Mask:
        """What is kept of rows ``start:stop``, bool ``[stop - start, columns]``."""


@dataclass(frozen=True, slots=True)
class SeededMasks:
    """Masks that depend on ``seed`` and on what is masked alone, not on order, cuts or threads.

    Each tensor has a Philox stream of its own (Salmon et al., "Parallel Random Numbers: As Easy as
    1, 2, 3", 2011), keyed by a hash of the seed and the tensor; a value's number is found by its
    place. The raw stream is used, which numpy keeps the same for ever, unlike its distributions.
    """

    seed: int

    def keep(self, masked: Masked, start: int, stop: int, density: float) -> Mask:
        first = start * masked.columns
        count = (stop - start) * masked.columns
        step, skipped = divmod(first, DRAWS_A_STEP)
        stream = np.random.Philox(key=self._key(masked))
        stream.advance(step)
        raw = stream.random_raw(-(-(skipped + count) // 2))
        draws = raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
        edge = min(round(density * 2**32), 2**32 - 1)
        kept: Mask = draws < np.uint32(edge)
        return kept.reshape(stop - start, masked.columns)

    def _key(self, masked: Masked) -> int:
        text = f"{self.seed}\0{masked.adapter}\0{masked.target}\0{masked.factor}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


@dataclass(frozen=True, slots=True)
class RandomKept:
    """Keeps what ``masks`` says, ``1 / density`` times as large."""

    masks: Masks
    masked: Masked
    density: float

    def prune(self, rows: Array, start: int) -> None:
        rows *= self.masks.keep(self.masked, start, start + len(rows), self.density)
        rows /= np.float32(self.density)
