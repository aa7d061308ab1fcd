"""GPTQ's kernels on torch tensors: the same codes and errors as on numpy's arrays, on any device.

Tensors are torch's on the CPU, and those of its device ``meta``, which have a shape and no values:
whatever a kernel leaves in the process's memory cannot be computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.quant import arrays, devices, gptq, imatrix
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, QTensor
from edgellm.quant.group_scales import GroupScales
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.quant.refit import refit_group, refit_super
from edgellm.quant.row_tiles import to_tiles
from edgellm.quant.statistics import Statistics

COLUMNS, DEAD = 256, 77
SCALAR = {
    name: grid
    for name, grid in GRIDS.items()
    if grid.kind != "float" and name not in VECTOR_CODEBOOKS
}
CASES = SCALAR | {
    f"{name} in {dtype}": replace(GRIDS[name], scale_dtype=dtype)
    for name in ("int4-g32", "nf4")
    for dtype in ("f16", "bf16")
}

MOST_OTHER_CODES = 0.002
"""Share of codes that may be others: sums are added up in another order, and what lies halfway
between two levels then goes to the other one. None was where this was measured."""


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    rng = np.random.default_rng(7)
    mixed = rng.standard_normal((3000, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS))
    inputs = mixed / COLUMNS**0.5 + rng.standard_normal((3000, COLUMNS)) * 0.3
    inputs *= np.exp(rng.standard_normal(COLUMNS) * 0.7)
    inputs[:, DEAD] = 0
    inputs = inputs.astype(np.float32)
    hessian = inputs.T @ inputs / np.float32(len(inputs))
    return Statistics(hessian, np.abs(inputs).max(axis=0), len(inputs))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    values = np.random.default_rng(8).standard_normal((70, COLUMNS)).astype(np.float32) * 0.05
    values[3] = 0
    values[5, ::17] *= 20
    return values


@pytest.fixture(scope="module")
def solved(rows, statistics) -> Iterator[Callable[[str], QTensor]]:
    """The rows on the grid of a name, each solved once by torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cache(lambda name: gptq.solve(rows, CASES[name], statistics, torch_device="cpu"))
    torch.set_num_threads(threads)


def output_error(tensor: QTensor, rows: np.ndarray, statistics: Statistics) -> np.ndarray:
    off = dequantize(tensor).astype(np.float64) - rows
    return np.einsum("ri,ij,rj->r", off, statistics.hessian.astype(np.float64), off)


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_solved_as_arrays_are(name, rows, statistics, solved) -> None:
    wanted = gptq.solve(rows, CASES[name], statistics)
    found = solved(name)
    same = found.codes == wanted.codes
    assert np.mean(~same) <= MOST_OTHER_CODES
    rows_alike = same.all(axis=1)
    for field in ("scales", "mins", "zeros"):
        ours, theirs = getattr(found, field), getattr(wanted, field)
        if theirs is not None:
            np.testing.assert_allclose(ours[rows_alike], theirs[rows_alike], rtol=1e-4)
            assert ours.dtype == theirs.dtype
    errors = output_error(wanted, rows, statistics)
    np.testing.assert_allclose(
        output_error(found, rows, statistics)[rows_alike], errors[rows_alike], rtol=1e-4
    )
    assert output_error(found, rows, statistics).sum() == pytest.approx(errors.sum(), rel=1e-3)


@pytest.mark.parametrize("name", ["int4-g64", "nf4", "q4_0", "q4_k", "q3_k", "iq4_xs"])
def test_what_comes_with_a_row_of_tensors_is_of_no_account(name, rows, statistics, solved) -> None:
    alone = gptq.solve(rows[:9], CASES[name], statistics, torch_device="cpu")
    assert np.mean(alone.codes != solved(name).codes[:9]) <= MOST_OTHER_CODES


@pytest.fixture
def visited(monkeypatch) -> list[str]:
    """Kinds of devices that results come back from; those without values come as zeros."""
    kinds: list[str] = []
    to_numpy = arrays.to_numpy

    def with_zeros(values: object) -> np.ndarray:
        if isinstance(values, np.ndarray):
            return to_numpy(values)
        kinds.append(values.device.type)
        return np.zeros(values.shape, str(values.dtype).removeprefix("torch."))

    monkeypatch.setattr(arrays, "to_numpy", with_zeros)
    return kinds


def test_nothing_is_solved_elsewhere_than_on_the_device(visited, rows, statistics) -> None:
    columns = slice(0, 32)
    some = Statistics(statistics.hessian[columns, columns], statistics.largest[columns], 1)
    found = gptq.solve(rows[:, columns], GRIDS["int4-g32"], some, torch_device="meta")
    assert found.codes.shape == (70, 32)
    assert set(visited) == {"meta"}


@pytest.mark.parametrize("name", ["nf4", "q4_1", "q4_k", "q3_k"])
def test_no_scale_is_refitted_elsewhere_than_on_the_device(name, visited, rows, statistics) -> None:
    scales = GroupScales(imatrix.fitted(rows, GRIDS[name], statistics.importance), "meta")
    weights, hessian = (arrays.moved(each, "meta") for each in (to_tiles(rows), statistics.hessian))
    levels = weights.clone()
    levels[:, 0] = scales.nearest(weights[:, 0], 0)
    group = slice(0, scales.group)
    refit_group(scales, 0, levels[:, group], weights[:, group], hessian[group, group])
    if scales.outer is not None:
        refit_super(scales, 0, levels, weights, hessian)
    assert scales.finished(levels, 70).codes.shape == (70, COLUMNS)
    assert set(visited) == {"meta"}


def test_what_torch_fails_at_is_said_with_what_to_do(rows, statistics) -> None:
    with pytest.raises(GenerationError, match=r"solved on nowhere: .* Leave --device out"):
        gptq.solve(rows, GRIDS["q4_0"], statistics, torch_device="nowhere")


@pytest.mark.parametrize("name", ["cuda", "metal"])
def test_a_device_that_is_not_here_is_refused_with_its_reason(name) -> None:
    if not devices.TORCH_DEVICES[name].missing(torch):
        assert devices.choose(name).name == devices.choose("auto").name
        return
    with pytest.raises(UnsupportedTarget, match=rf"--device {name} .*: torch \d.* leave --device"):
        devices.choose(name)
