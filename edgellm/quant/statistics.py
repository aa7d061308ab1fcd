"""What calibration knows of a linear layer's inputs: all that solvers and transforms are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, TypeVar

from edgellm.tensors import Array

Made = TypeVar("Made")


@dataclass(frozen=True)
class Statistics:
    """Of the inputs ``x`` ``[tokens, in]`` that a weight ``[out, in]`` is multiplied by.

    ``hessian`` float32 ``[in, in]`` is ``x.T @ x / tokens``: the error of the output of rounded
    weights is ``trace(e @ hessian @ e.T)`` for their difference ``e``. Where importance was all
    that was asked for, it is the diagonal alone, ``[in]``. ``largest`` float32 ``[in]`` is the
    largest magnitude of each channel. ``tokens`` counts those that were seen.

    Tokens may have been weighed in the Hessian; ``squares`` ``[in]`` are then the channels' mean
    squares, all tokens counted alike. One object is shared by all weights that have the same input.
    ``instead``: what these are of, where too few tokens were seen of the input itself.
    """

    hessian: Array
    largest: Array
    tokens: int
    squares: Array | None = None
    instead: str = ""
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: RLock = field(default_factory=RLock, init=False, repr=False, compare=False)

    @property
    def importance(self) -> Array:
        """How much an error in each channel counts, float32 ``[in]``: the Hessian's diagonal."""
        return (self.hessian if self.hessian.ndim == 1 else self.hessian.diagonal()).copy()

    @property
    def mean_squares(self) -> Array:
        """The mean square of each channel, float32 ``[in]``: llama.cpp's importance."""
        return self.importance if self.squares is None else self.squares

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gave when ``name`` was first asked for; other threads wait meanwhile."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            made: Made = self._made[name]
            return made
