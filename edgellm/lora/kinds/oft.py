"""OFT: a layer's inputs turned by a block-diagonal orthogonal matrix.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280, and its input-centric form, OFTv2, Qiu et al.
2025, https://arxiv.org/abs/2506.19847, with the Cayley-Neumann parameterization. PEFT
(``OFTRotationModule.get_weight`` and ``Linear.merge``, ``tuners/oft/layer.py``, peft 0.21.2) holds
the upper triangles of skew-symmetric matrices, one row a block: ``W R^T`` for a linear layer,
``W R`` for an embedding. ``module_dropout`` acts while training only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.lora.factors import kept
from edgellm.lora.kinds.multiplying import Multiplying
from edgellm.lora.kinds.parts import exactly, linear
from edgellm.lora.kinds.rotation import cayley, cayley_neumann, skew_from_upper, turned
from edgellm.tensors import Array, TensorRef

LINEAR = "oft_R"
EMBEDDING = "oft_embedding_R"
OLD = "oft_r"


@dataclass(frozen=True)
class Rotation(Multiplying):
    """``W @ block_diagonal(R^T)``, or ``R`` itself where ``as_embedding``.

    ``upper`` is ``[blocks, size * (size - 1) / 2]``, with one row where a block serves all.
    ``terms``: of the Neumann series, None for the exact inverse; ``half_last`` is its form.
    ``radius``: how far COFT lets a block's parameters be from zero, None for plain OFT.
    """

    kind: ClassVar[str] = "OFT"
    upper: TensorRef
    size: int
    as_embedding: bool
    terms: int | None
    half_last: bool
    radius: float | None
    name: str

    def multiplied(self, rows: Array, start: int, stop: int) -> Array:
        return turned(rows, kept.get(self, self._blocks), start)

    def _blocks(self) -> Array:
        """What the inputs are turned by, ``[blocks, size, size]``; one block's work at a time."""
        upper = self.upper.load()
        if self.radius is not None:
            upper = _projected(upper, self.radius)
        blocks = np.empty((len(upper), self.size, self.size), dtype=np.float32)
        for block, values in zip(blocks, upper, strict=True):
            skew = skew_from_upper(values, self.size)
            rotation = (
                cayley(skew)
                if self.terms is None
                else cayley_neumann(skew, self.terms, half_last=self.half_last)
            )
            block[...] = rotation if self.as_embedding else rotation.T
        return blocks


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Rotation:
    """The rotation of ``target``; raises ``AdapterError`` for what does not fit.

    The block's size is read off the stored shape, which ``r`` and ``oft_block_size`` lead to only
    after PEFT has adjusted them. Adapters of PEFT before 0.16 (``oft_r``) are refused, as PEFT
    does.
    """
    if OLD in parts or "oft_block_size" not in config:
        raise AdapterError(
            f"{target.name}: this is OFT as PEFT stored it before 0.16, which newer versions read "
            "no more, and which turns other blocks: merge it with peft 0.15.2, or train it again"
        )
    as_embedding = target.kind == "embedding"
    (upper,) = exactly(target, parts, EMBEDDING if as_embedding else LINEAR)
    into = target.shape[1] if as_embedding else linear(target, "OFT")[1]
    size = _block_size(target, upper, into, bool(config.get("block_share")))
    neumann = config.get("use_cayley_neumann", True)
    blocks = upper.shape[0]
    return Rotation(
        upper,
        size,
        as_embedding,
        terms=int(config.get("num_cayley_neumann_terms", 5)) if neumann else None,
        half_last=not neumann or _series_ends_halved(config),
        radius=float(config.get("eps", 6e-5)) / math.sqrt(blocks) if config.get("coft") else None,
        name=target.name,
    )


def _block_size(target: Target, upper: TensorRef, into: int, shared: bool) -> int:
    """The ``size`` whose triangle has as many values as a row of ``upper``."""
    blocks, values = upper.shape if len(upper.shape) == 2 else (0, 0)
    size = (1 + math.isqrt(1 + 8 * values)) // 2
    covered = into % size == 0 and blocks == 1 if shared else blocks * size == into
    if size * (size - 1) // 2 != values or not covered:
        raise AdapterError(
            f"{target.name} {list(target.shape)}: the stored rotations have shape "
            f"{list(upper.shape)}, and triangles of blocks that make up its {into} inputs are "
            f"needed{' (block_share)' if shared else ''}: the adapter was trained on another "
            "model, or config and weights belong to different adapters; name its own base"
        )
    return size


def _series_ends_halved(config: Mapping[str, Any]) -> bool:
    """Whether the adapter was trained with the Neumann series of peft 0.18 and later.

    Configs name their PEFT since 0.18 only. Builds between 0.17 and 0.18 may be either way.
    """
    version = config.get("peft_version")
    if version is None:
        return False
    found = re.match(r"(\d+)\.(\d+)", str(version))
    if found is None or (int(found[1]), int(found[2])) < (0, 18):
        raise AdapterError(
            f"this OFT adapter was trained with peft {version}, a build from when the "
            "Cayley-Neumann series changed, so which of the two it means is unknown: merge it with "
            "that very build, or train it again with peft 0.18 or later"
        )
    return True


def _projected(upper: Array, radius: float) -> Array:
    """COFT: each block's parameters drawn back to ``radius`` (``_project_batch``, peft 0.21.2).

    The distance is that of the whole skew-symmetric matrix, in which each value stands twice.
    """
    squares = np.einsum("ij,ij->i", upper, upper, dtype=np.float64)
    distances = np.sqrt(2.0 * squares)
    factors = np.minimum(1.0, radius / np.maximum(distances, np.finfo(np.float64).tiny))
    projected: Array = (upper * factors[:, None]).astype(np.float32)
    return projected
