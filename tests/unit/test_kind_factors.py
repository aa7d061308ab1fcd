"""Products by tiles of rows, and the factors that are kept: exact whatever the cut."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest

from edgellm.lora.factors import TILE_ROWS, Kept, row_product


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("inner", [1, 3, 8, 33, 257])
@pytest.mark.parametrize("columns", [1, 33, 96, 577])
def test_a_row_has_the_same_bits_in_every_slab(inner: int, columns: int) -> None:
    left, right = drawn(3 * TILE_ROWS + 5, inner), drawn(inner, columns)
    whole = row_product(left, right, 0)
    for step in (1, 2, 7, TILE_ROWS, TILE_ROWS + 1, 70):
        pieces = [row_product(left[i : i + step], right, i) for i in range(0, len(left), step)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole, strict=True)


def test_a_product_is_the_product() -> None:
    left, right = drawn(50, 40), drawn(40, 30)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(row_product(left, right, 13), exact, rtol=0, atol=2e-5)


def test_the_latest_factors_stay_and_the_budget_holds() -> None:
    kept = Kept(budget_bytes=3 * 400)
    made: list[str] = []

    class Owner:
        def __init__(self, name: str) -> None:
            self.name = name

        def array(self) -> np.ndarray:
            made.append(self.name)
            return np.full(100, len(made), dtype=np.float32)

    owners = [Owner(name) for name in "abcd"]
    for owner in owners[:3]:
        kept.get(owner, owner.array)
    kept.get(owners[0], owners[0].array)  # used again, so "b" is now the oldest
    kept.get(owners[3], owners[3].array)
    kept.get(owners[0], owners[0].array)
    assert made == ["a", "b", "c", "d"]
    kept.get(owners[1], owners[1].array)
    assert made == ["a", "b", "c", "d", "b"]


def test_a_factor_beyond_the_budget_is_kept_alone() -> None:
    kept = Kept(budget_bytes=10)
    calls: list[int] = []

    def make() -> np.ndarray:
        calls.append(1)
        return np.zeros(100, dtype=np.float32)

    owner = Kept()
    assert kept.get(owner, make) is kept.get(owner, make)
    assert len(calls) == 1


def test_what_owns_factors_is_not_kept_alive() -> None:
    """Or the files of an adapter would stay open, which keeps Windows from deleting them."""
    kept = Kept()
    owner: Kept | None = Kept()
    kept.get(owner, lambda: np.zeros(1, dtype=np.float32))
    gone = weakref.ref(owner)
    owner = None
    assert gone() is None
    for number in range(100):  # some of these get the id of one before
        made = kept.get(Kept(), partial(np.full, 1, number, np.float32))
        assert made == number
