"""What calibration knows of a linear layer's inputs: all that solvers and transforms are given."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.tensors import Array


@dataclass(frozen=True)
class Statistics:
    """Of the inputs ``x`` ``[tokens, in]`` that a weight ``[out, in]`` is multiplied by.

    ``hessian`` float32 ``[in, in]`` is ``x.T @ x / tokens``: the error of the output of rounded
    weights is ``trace(e @ hessian @ e.T)`` for their difference ``e``. Where importance was all
    that was asked for, it is the diagonal alone, ``[in]``. ``largest`` float32 ``[in]`` is the
    largest magnitude of each channel. ``tokens`` counts those that were seen.

    One object is shared by all weights that have the same input.
    """

    hessian: Array
    largest: Array
    tokens: int

    @property
    def importance(self) -> Array:
        """The mean square of each channel, float32 ``[in]``: llama.cpp's importance."""
        return (self.hessian if self.hessian.ndim == 1 else self.hessian.diagonal()).copy()
