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
def quick_float32() -> Iterator[None]:
    """Float32 products by oneDNN, which torch otherwise leaves to MKL.

    It does so where oneDNN may round what it multiplies to bfloat16 ("medium"), which happens only
    where the processor has instructions for matrices (AMX). On two Zen 5 cores: 225 GFLOPS by MKL,
    480 by oneDNN.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def quick_products(weights: StudentWeights, products: str) -> Iterator[None]:
    """Products with ``weights`` in the type ``products`` (930 GFLOPS in bfloat16), others quick."""
    weights.products = getattr(torch, products)
    try:
        with quick_float32():
            yield
    finally:
        weights.products = torch.float32
