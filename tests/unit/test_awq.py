"""Activation-aware scaling: the output's error falls, and nothing but rounding changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgellm.architectures.couplings import Coupling
from edgellm.calibration.folding import folded_statistics
from edgellm.quant import awq, gptq, imatrix, rtn
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.scaling import Weight
from edgellm.quant.statistics import Statistics
from edgellm.slabs import values_of
from edgellm.tensors import Array, TensorRef, constant


def inputs_of(columns: int, seed: int = 0, spread: float = 1.0, mixed: float = 0.3) -> Statistics:
    """Inputs whose channels differ in size by about ``e ** spread`` and depend on one another."""
    draw = np.random.default_rng(seed)
    mix = np.eye(columns) + mixed * draw.standard_normal((columns, columns)) / columns**0.5
    x = draw.standard_normal((4 * columns, columns)) @ mix
    x *= np.exp(spread * draw.standard_normal(columns))
    hessian = (x.T @ x / len(x)).astype(np.float32)
    return Statistics(hessian, np.abs(x).max(axis=0).astype(np.float32), len(x))


def weights_of(rows: int, columns: int, seed: int = 1) -> TensorRef:
    draw = np.random.default_rng(seed)
    return constant("blk.0.ffn_up.weight", draw.standard_normal((rows, columns)) / columns**0.5)


def plain_coupling(columns: int) -> Coupling:
    return Coupling(0, "ffn_norm", ("blk.0.ffn_up.weight",), (), columns)


def output_error(off: Array, statistics: Statistics) -> float:
    return float(np.einsum("ij,ij->", off @ statistics.hessian, off, dtype=np.float64))


def error_with(rows: Array, grid: Grid, columns: Array, statistics: Statistics) -> float:
    """Of the output, with columns scaled, rounded as the imatrix solver begins, and scaled back."""
    folded = folded_statistics(statistics, columns)
    rounded = dequantize(imatrix.fitted(rows * columns, grid, folded.importance))
    return output_error(rounded / columns - rows, statistics)


def best_alpha(rows: Array, grid: Grid, statistics: Statistics) -> float:
    """The least error with the paper's factors, over twenty of its exponents."""
    rms = np.sqrt(statistics.importance)
    return min(
        error_with(rows, grid, rms ** np.float32(alpha), statistics)
        for alpha in np.linspace(0, 1, 20, endpoint=False)
    )


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-sym", "q4_0", "q4_k", "nf4", "q3_k"])
def test_no_worse_than_the_papers_search_and_better_than_none(name: str) -> None:
    """Judged by the whole Hessian, which the search does not look at: 0.78 to 0.93 of plain."""
    grid, statistics, ref = GRIDS[name], inputs_of(256), weights_of(96, 256)
    found = awq.search([Weight(ref, grid)], statistics, plain_coupling(256))
    rows = ref.load()
    ours = error_with(rows, grid, found.factors, statistics)
    plain = error_with(rows, grid, np.ones(256, np.float32), statistics)
    assert ours < 0.95 * plain
    assert ours < 1.01 * best_alpha(rows, grid, statistics)
    assert found.error == pytest.approx(ours / plain, rel=0.15)


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-sym", "q4_0", "q4_k", "nf4", "q3_k"])
def test_the_search_that_clips_is_better_afterwards_than_plain_rounding(name: str) -> None:
    """0.62 to 0.78 of its error; and the factors need no more than the diagonal."""
    grid, statistics, ref = GRIDS[name], inputs_of(256), weights_of(96, 256)
    coupling, rows = plain_coupling(256), ref.load()
    factors = awq.search([Weight(ref, grid)], statistics, coupling).factors
    diagonal = replace(statistics, hessian=statistics.importance)
    of_diagonal = awq.search([Weight(ref, grid)], diagonal, coupling).factors
    np.testing.assert_array_equal(of_diagonal, factors)
    plainly = values_of(rtn.solve(rows * factors, grid)) / factors - rows
    clipped = error_with(rows, grid, factors, statistics)
    assert clipped < 0.85 * output_error(plainly, statistics)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["int4-g64", "q4_0"])
def test_gptq_gains_too(name: str, corrected: bool) -> None:
    """0.7 to 0.81 of its error, whichever weights of the columns are counted with."""
    grid, ref = GRIDS[name], weights_of(64, 128)
    statistics = inputs_of(128, mixed=2.0)
    rows = ref.load()

    def solved(columns: Array) -> float:
        folded = folded_statistics(statistics, columns)
        off = dequantize(gptq.solve(rows * columns, grid, folded)) / columns - rows
        return output_error(off, statistics)

    found = awq.search([Weight(ref, grid)], statistics, plain_coupling(128), corrected=corrected)
    assert solved(found.factors) < 0.9 * solved(np.ones(128, np.float32))


@pytest.mark.parametrize(("name", "most"), [("q8_0", 0.9), ("q4_k", 0.95), ("q6_k", 0.6)])
def test_what_llamacpp_rounds_of_activations_counts(
    name: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error of outputs with both rounded, as ggml does, by that with factors for weights alone."""
    grid, ref, coupling = GRIDS[name], weights_of(96, 512), plain_coupling(512)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((512, 512)).astype(np.float32)
    x[:, draw.choice(512, 16, replace=False)] *= 16
    hessian = (x.T @ x / len(x)).astype(np.float32)
    statistics = Statistics(hessian, np.abs(x).max(axis=0), len(x))
    rows, exact = ref.load(), x @ ref.load().T

    def error() -> float:
        columns = awq.search([Weight(ref, grid)], statistics, coupling).factors
        importance = folded_statistics(statistics, columns).importance
        rounded = dequantize(imatrix.fitted(rows * columns, grid, importance))
        blocks = (x / columns).reshape(len(x), -1, grid.block)
        steps = np.abs(blocks).max(axis=2, keepdims=True) / 127  # quantize_row_q8_0, _q8_K
        activations = (np.round(blocks / steps) * steps).reshape(x.shape)
        return float(np.square(activations @ rounded.T - exact).sum())

    both = error()
    monkeypatch.setattr(awq, "TAILS", 0.0)
    assert both < most * error()


def test_weights_that_share_an_input_are_judged_together() -> None:
    """A large and a small weight: the factors are near those of the large one, by its rows."""
    grid, statistics, coupling = GRIDS["int4-g32"], inputs_of(64), plain_coupling(64)
    large, small = weights_of(256, 64, seed=2), weights_of(16, 64, seed=3)
    both, alone, other = (
        np.log(awq.search([Weight(ref, grid) for ref in refs], statistics, coupling).factors)
        for refs in ([large, small], [large], [small])
    )
    assert np.abs(both - alone).max() < 0.5 * np.abs(both - other).max()


def test_heads_of_a_group_get_one_set_of_factors() -> None:
    """The channel that carries much in one head of the group is large in all of them."""
    coupling = Coupling(0, "attn_v", ("blk.0.attn_output.weight",), (), 32, kv_heads=2, group=2)
    sizes = np.ones(128, np.float32)
    sizes[32 + 5] = 30  # kv head 0, second query head, channel 5
    statistics = Statistics(np.diag(sizes**2), sizes, 100)
    found = awq.search([Weight(weights_of(64, 128), GRIDS["int4-g32"])], statistics, coupling)
    assert found.factors.shape == (64,)
    assert found.factors.argmax() == 5
    assert found.factors[5] > 1.5 * np.delete(found.factors, 5).max()


def test_nothing_to_gain_leaves_factors_at_one() -> None:
    """Equal channels, and weights that lie on the grid already."""
    coupling, grid = plain_coupling(64), GRIDS["int4-g32-sym"]
    codes = np.random.default_rng(0).integers(-8, 8, (40, 64)).astype(np.float32)
    codes[:, ::32] = -8
    equal = Statistics(np.eye(64, dtype=np.float32), np.ones(64, np.float32), 100)
    found = awq.search([Weight(constant("w", codes), grid)], equal, coupling)
    np.testing.assert_array_equal(found.factors, 1)
    silent = Statistics(np.zeros((64, 64), np.float32), np.zeros(64, np.float32), 100)
    found = awq.search([Weight(weights_of(40, 64), grid)], silent, coupling)
    np.testing.assert_array_equal(found.factors, 1)
    assert "always zero" in found.reason


def test_dead_channels_and_zero_weights_keep_factors_finite() -> None:
    statistics = inputs_of(64)
    hessian = statistics.hessian.copy()
    hessian[:3] = hessian[:, :3] = 0
    rows = weights_of(40, 64).load()
    rows[:, 60:] = 0
    rows[7] = 0
    dead = Statistics(hessian, statistics.largest, 100)
    for corrected in (False, True):
        found = awq.search(
            [Weight(constant("w", rows), GRIDS["q4_0"])],
            dead,
            plain_coupling(64),
            corrected=corrected,
        )
        assert np.isfinite(found.factors).all()
        assert np.exp(-awq.FARTHEST) * 0.99 < found.factors.min()
        assert found.factors.max() < np.exp(awq.FARTHEST) * 1.01
        assert found.error < 1


def test_large_weights_are_judged_by_rows_spread_over_all_of_them() -> None:
    """Rows of the last quarter alone use channel 9, and it is not missed."""
    rows = weights_of(4096, 64).load()
    rows[:3072, 9] = 0
    sizes = np.ones(64, np.float32)
    sizes[9] = 40
    statistics = Statistics(np.diag(sizes**2), sizes, 100)
    loads: list[int] = []
    stored = constant("w", rows)

    def load_rows(start: int, stop: int) -> Array:
        loads.append(stop - start)
        return stored.load_rows(start, stop)

    ref = TensorRef("w", "w", rows.shape, "f32", rows.nbytes, load_rows)
    found = awq.search([Weight(ref, GRIDS["int4-g32"])], statistics, plain_coupling(64))
    assert sum(loads) == 1024
    assert found.factors[9] > 1.4 * np.delete(found.factors, 9).max()
