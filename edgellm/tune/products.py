"""How products are taken while gradients are sought: as fast as the machine can.

Training bears numbers of 8 significant bits, since what one step errs the next ones correct; what
is judged by is computed in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgellm.tune.weights import StudentWeights


@contextmanager
def quick_products(weights: StudentWeights, products: str) -> Iterator[None]:
    """Products with ``weights`` in the type ``products``, and those in float32 by oneDNN.

    torch leaves float32 to MKL unless oneDNN may round what it multiplies to bfloat16, which it
    does only where the processor has instructions for matrices (AMX). On two Zen 5 cores: 225
    GFLOPS by MKL, 480 by oneDNN, 930 in bfloat16.
    """
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = onednn.fp32_precision
    onednn.fp32_precision, weights.products = "bf16", getattr(torch, products)
    try:
        yield
    finally:
        onednn.fp32_precision, weights.products = before, torch.float32
