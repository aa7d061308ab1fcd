"""Sums of inputs: against float64, and the same bits however threads bring the pieces."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgellm.calibration import sums
from edgellm.calibration.sums import InputSums
from edgellm.quant.statistics import Statistics

PIECES = [
    np.random.default_rng(number).standard_normal((tokens, 70)).astype(np.float32)
    for number, tokens in enumerate((50, 50, 3, 1, 40, 60))
]


def added_up(workers: int, *, diagonal_only: bool = False) -> Statistics:
    total = InputSums(70, diagonal_only=diagonal_only)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(total.add, range(len(PIECES)), PIECES))
    return total.result()


@pytest.mark.parametrize("strip_columns", [16, 64, 4096])
def test_sums_are_those_of_float64(strip_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "STRIP_COLUMNS", strip_columns)
    found = added_up(1)
    x = np.concatenate(PIECES).astype(np.float64)
    np.testing.assert_allclose(found.hessian, x.T @ x / len(x), atol=1e-6)
    np.testing.assert_array_equal(found.hessian, found.hessian.T)
    np.testing.assert_array_equal(found.largest, np.abs(x).max(axis=0).astype(np.float32))
    assert found.tokens == len(x)
    diagonal = added_up(1, diagonal_only=True)
    np.testing.assert_allclose(diagonal.importance, found.importance, rtol=1e-5)
    np.testing.assert_array_equal(diagonal.largest, found.largest)


@pytest.mark.parametrize("strip_columns", [16, 4096])
def test_bits_do_not_depend_on_who_brings_the_pieces(
    strip_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "STRIP_COLUMNS", strip_columns)
    one, many = added_up(1), added_up(len(PIECES))
    assert one.hessian.tobytes() == many.hessian.tobytes()


def test_nobody_waits_for_a_piece_that_does_not_come() -> None:
    total = InputSums(70)
    waiting = threading.Thread(target=total.add, args=(1, PIECES[1]))
    waiting.start()
    total.stop()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
