"""C3A: circulant blocks, each a vector turned step by step, added to the weight.

Chen et al. 2024, https://arxiv.org/abs/2407.19342. ``c3a_kernel`` is ``[out / b, in / b,
b]``, and PEFT divides by the number of inputs (``C3ALayer.get_delta_weight``,
``tuners/c3a/layer.py``, peft 0.21.2). It multiplies in Fourier's space; written out, output ``k``
of a block takes input ``j`` times ``kernel[(j - k) % b]``, which needs no transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Additive, Target
from edgellm.lora.kinds.parts import exactly, linear
from edgellm.tensors import Array, TensorRef


@dataclass(frozen=True)
class Circulant(Additive):
    """``kernel`` ``[out / b, in / b, b]`` as blocks of ``b`` by ``b``, divided by the inputs."""

    kernel: TensorRef
    rank: ClassVar[int] = 0
    scale: ClassVar[float] = 1.0

    def delta(self, start: int, stop: int) -> Array:
        _, across, size = self.kernel.shape
        first, last = start // size, -(-stop // size)
        kernel = self.kernel.load(first, last).reshape(-1, across, size)
        rows = np.arange(start, stop)
        turns = (np.arange(size) - rows[:, None] % size) % size
        change = np.take_along_axis(kernel[rows // size - first], turns[:, None, :], axis=2)
        change /= np.float32(across * size)
        return change.reshape(stop - start, across * size)


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Circulant:
    """The change of ``target`` by C3A; the blocks' size is read off the stored shape.

    Raises ``AdapterError`` for what does not fit.
    """
    out, into = linear(target, "C3A")
    (kernel,) = exactly(target, parts, "c3a_kernel")
    down, across, size = kernel.shape if len(kernel.shape) == 3 else (0, 0, 0)
    if (down * size, across * size) != (out, into):
        raise AdapterError(
            f"{target.name} {list(target.shape)}: c3a_kernel has shape {list(kernel.shape)}, and "
            "[out / b, in / b, b] of one block size b is needed: the adapter was trained on "
            "another model; name its own base"
        )
    return Circulant(kernel)
