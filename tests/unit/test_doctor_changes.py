"""The size of a change, and what of it narrow floats lose, against values counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.lora.check import changes, doctor
from edgellm.lora.check.changes import change_of, overall
from edgellm.lora.edit import LowRank
from edgellm.lora.kinds.ia3 import Scaling
from edgellm.tensors import constant


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("slab_bytes", [1 << 20, 3 * 4 * 16])
def test_norms_and_shares_do_not_depend_on_slabs(
    slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "COLUMN_CHUNK_BYTES", slab_bytes)
    before, delta = weight((10, 16)), 1e-3 * weight((10, 16), 1)
    delta[3] = 0
    found = change_of(constant("w", before), constant("w", before + delta))
    moved = (before + delta) - before
    assert found.change_norm == pytest.approx(np.linalg.norm(moved.astype(np.float64)), rel=1e-12)
    assert found.weight_norm == pytest.approx(np.linalg.norm(before.astype(np.float64)), rel=1e-12)
    assert found.relative == pytest.approx(found.change_norm / found.weight_norm)
    assert found.largest == np.abs(before + delta).max()
    halves = (before.astype(np.float16) == (before + delta).astype(np.float16)) & (moved != 0)
    assert found.vanishing_f16 == halves.sum() / 144
    assert 0 < found.vanishing_f16 < found.vanishing_bf16 < 1


def test_bf16_keeps_eight_bits() -> None:
    """Around 1 bf16 steps by 2**-7: half a step goes back to the even neighbour, more does not."""
    before = np.ones((1, 4), np.float32)
    delta = np.array([[2**-8, 2**-8 + 2**-20, 2**-7, 0]], np.float32)
    found = change_of(constant("w", before), constant("w", before + delta))
    assert found.vanishing_bf16 == pytest.approx(1 / 3)
    assert found.vanishing_f16 == 0.0


def test_bf16_shares_equal_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    before, delta = weight((50, 40)), 3e-3 * weight((50, 40), 1)
    after = before + delta
    found = change_of(constant("w", before), constant("w", after))
    old, new = (torch.tensor(side).bfloat16() for side in (before, after))
    wanted = ((old == new) & torch.tensor(after != before)).sum().item()
    assert found.vanishing_bf16 == wanted / (after != before).sum()


def test_values_beyond_f16_are_counted_where_they_are_new() -> None:
    before = np.array([[1.0, 70000.0, 2.0]], np.float32)
    after = np.array([[66000.0, 71000.0, 65504.0]], np.float32)
    found = change_of(constant("w", before), constant("w", after))
    assert found.beyond_f16 == 1
    faults, _ = doctor._judged([found])
    assert "beyond f16's 65504" in faults[0]


def test_added_rows_are_compared_with_nothing() -> None:
    before = weight((4, 8))
    after = np.concatenate([before, weight((2, 8), 1)])
    found = change_of(constant("w", before), constant("w", after))
    assert found.change_norm == pytest.approx(np.linalg.norm(after[4:]), rel=1e-6)
    assert found.weight_norm == pytest.approx(np.linalg.norm(before), rel=1e-6)


def test_all_changes_together() -> None:
    one = change_of(constant("a", np.ones((1, 4))), constant("a", np.full((1, 4), 1.5)))
    two = change_of(constant("b", np.ones((1, 9))), constant("b", np.ones((1, 9))))
    assert overall([one, two]) == pytest.approx((1 / 13) ** 0.5)
    assert overall([]) is None
    nothing = change_of(constant("c", np.zeros((1, 4))), constant("c", np.ones((1, 4))))
    assert nothing.relative is None


def test_a_change_larger_than_the_weight_and_one_that_vanishes_are_told() -> None:
    before = weight((8, 8))
    large = change_of(constant("w", before), constant("w", 3 * before))
    assert "larger than the weight itself in w" in doctor._judged([large])[1][0]
    small = change_of(constant("w", before), constant("w", before * np.float32(1 + 1e-4)))
    texts = " ".join(doctor._judged([small])[1])
    assert "in bf16" in texts
    assert "in f16" in texts


def low_rank(b: np.ndarray) -> LowRank:
    return LowRank(constant("a", weight((2, 6))), constant("b", b), 2.0)


def test_a_zero_b_changes_nothing_and_one_late_value_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLAB_BYTES", 2 * 4 * 6)
    b = np.zeros((9, 2), np.float32)
    target = constant("w", weight((9, 6)))
    assert not doctor.changes_anything(low_rank(b), target)
    b[8, 1] = 1e-20
    assert doctor.changes_anything(low_rank(b), target)


def test_an_untrained_change_that_multiplies() -> None:
    target = constant("w", weight((9, 6)))
    ones = np.ones(9, np.float32)
    assert not doctor.changes_anything(Scaling(constant("l", ones), True, "w"), target)
    ones[8] = 1.01
    assert doctor.changes_anything(Scaling(constant("l", ones), True, "w"), target)
