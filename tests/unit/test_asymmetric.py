"""Weights moved to make good what was lost before: against float64, and by what is left of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgellm.quant import asymmetric, factor, gptq
from edgellm.quant.asymmetric import target
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS
from edgellm.quant.statistics import Statistics

COLUMNS, TOKENS = 320, 4000
DEAD = (3, 200)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """What was to come and what comes, in float64: a twelfth is lost, and goes with the rest."""
    rng = np.random.default_rng(1)
    wanted = rng.standard_normal((TOKENS, 40)) @ rng.standard_normal((40, COLUMNS))
    wanted += rng.standard_normal((TOKENS, COLUMNS))
    given = wanted + wanted @ rng.standard_normal((COLUMNS, COLUMNS)) * 0.005
    given[:, DEAD] = 0
    return wanted, given


@pytest.fixture(scope="module")
def statistics(inputs: tuple[np.ndarray, np.ndarray]) -> Callable[[bool], Statistics]:
    wanted, given = inputs

    def of(lags: bool) -> Statistics:
        hessian = (given.T @ given / TOKENS).astype(np.float32)
        lag = (given.T @ (wanted - given) / TOKENS).astype(np.float32)
        return Statistics(hessian, np.abs(given).max(axis=0), TOKENS, lag=lag if lags else None)

    return of


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((70, COLUMNS)).astype(np.float32) * 0.05


def test_the_step_is_that_of_damped_least_squares(
    rows: np.ndarray, statistics: Callable[[bool], Statistics]
) -> None:
    known = statistics(True)
    assert known.lag is not None
    alive = np.delete(np.arange(COLUMNS), DEAD)
    hessian = known.hessian[np.ix_(alive, alive)].astype(np.float64)
    damped = hessian + factor.DAMPING * hessian.diagonal().mean() * np.eye(len(alive))
    step = np.linalg.solve(damped, known.lag[alive] @ rows.T.astype(np.float64)).T
    wanted = rows.astype(np.float64)
    wanted[:, alive] += asymmetric.SHARE * step
    found = target(rows, known)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(step).max())
    np.testing.assert_array_equal(found[:, DEAD], rows[:, DEAD])


def test_rows_come_out_the_same_however_they_are_grouped(
    rows: np.ndarray, statistics: Callable[[bool], Statistics]
) -> None:
    known = statistics(True)
    apart = np.concatenate([target(rows[:9], known), target(rows[9:], known)])
    assert apart.tobytes() == target(rows, known).tobytes()


def test_nothing_moves_where_nothing_lags(
    rows: np.ndarray, statistics: Callable[[bool], Statistics]
) -> None:
    assert target(rows, statistics(False)) is rows
    assert target(rows, None) is rows


def test_less_of_the_output_is_lost(
    rows: np.ndarray,
    inputs: tuple[np.ndarray, np.ndarray],
    statistics: Callable[[bool], Statistics],
) -> None:
    wanted, given = inputs

    def lost(known: Statistics) -> float:
        rounded = dequantize(gptq.solve(target(rows, known), GRIDS["q4_0"], known))
        return float(np.square(given @ rounded.T - wanted @ rows.T).mean())

    assert lost(statistics(True)) < 0.8 * lost(statistics(False))
