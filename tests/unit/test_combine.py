"""Adapters combined: what is refused, when tensors are read, and the parts that numpy can judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import AdapterError, TensorError, UsageError
from edgellm.lora.binding import Combination
from edgellm.lora.combine.check import check, settled
from edgellm.lora.combine.combined import combined
from edgellm.lora.combine.dare import Masked, SeededMasks
from edgellm.lora.combine.leading import _sought
from edgellm.lora.combine.methods import METHODS
from edgellm.lora.combine.pruning import LargestKept
from edgellm.lora.combine.truncation import truncated
from edgellm.lora.edit import Additive, LowRank, Target
from edgellm.lora.kinds.ia3 import Scaling
from edgellm.tensors import SLAB_BYTES, Array, TensorRef, constant

TARGET = Target("model.layers.0.mlp.up_proj.weight", (60, 44), "linear")
WEIGHTS = (0.7, 1.0, 0.4)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def lora(seed: int, rank: int = 4, shape: tuple[int, ...] = TARGET.shape) -> LowRank:
    a, b = random(seed, rank, shape[1]), random(seed + 100, shape[0], rank)
    return LowRank(constant("a", a), constant("b", b), 0.5 * seed)


@dataclass(frozen=True)
class Full(Additive):
    """An additive change without factors, as LoHa's."""

    values: Array
    rank: int = 0
    scale: float = 1.0

    def delta(self, start: int, stop: int) -> Array:
        return self.values[start:stop].copy()


@dataclass(frozen=True)
class Multiplied:
    """A change that depends on the weight, as IA3's."""

    rank: int = 0
    scale: float = 1.0

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        return rows * np.float32(1 + weight)


def exact(edits: Sequence[LowRank | Full], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """The weighted sum in float64."""
    total = np.zeros(TARGET.shape)
    for edit, weight in zip(edits, weights, strict=True):
        if isinstance(edit, Full):
            total += weight * edit.values.astype(np.float64)
        else:
            product = edit.b.load().astype(np.float64) @ edit.a.load().astype(np.float64)
            total += weight * edit.scale * product
    return total


def how(method: str, **settings: object) -> Combination:
    density = {} if METHODS[method].prune is None else {"density": 0.3}
    return Combination(method, **(density | settings))  # type: ignore[arg-type]


def whole(edit: object) -> Array:
    delta: Array = edit.delta(0, TARGET.shape[0])  # type: ignore[attr-defined]
    return delta


# What is refused before anything is read


@pytest.mark.parametrize(
    ("combination", "weights", "message"),
    [
        (
            Combination("tie"),
            (1, 1),
            "no way to combine adapters is named 'tie': did you mean ties",
        ),
        (Combination("sum"), (1, 1), "choose cat, svd, linear"),
        (Combination("ties"), (1, 1), "ties needs a density.*--density 0.2"),
        (Combination("dare_linear"), (1, 1), "dare_linear needs a density.*--density 0.5"),
        (Combination("ties", density=0.0), (1, 1), "more than 0 and at most 1, got density 0"),
        (Combination("ties", density=1.5), (1, 1), "got density 1.5"),
        (Combination("ties", density=float("nan")), (1, 1), "got density nan"),
        (Combination("cat", density=0.5), (1, 1), "cat prunes nothing.*choose ties, dare_linear"),
        (Combination("linear", density=0.5), (1,), "linear prunes nothing"),
        (Combination("cat", sign="frequency"), (1, 1), "cat elects no signs.*choose ties, dare_t"),
        (Combination("ties", 0.5, sign="mean"), (1, 1), "'mean': choose total or frequency"),
        (Combination("linear", rank=4), (1, 1), "linear does not cut to a rank.*choose svd, ties_"),
        (Combination("svd", rank=0), (1, 1), "must be 1 or more, got 0"),
        (Combination("cat"), (), "needs at least one adapter"),
        (Combination("cat"), (1, float("inf")), "finite number other than 0, got inf"),
        (Combination("cat"), (1, 0), "finite number other than 0, got 0"),
        (Combination("ties", 0.5), (1, -0.5), r"opposite sign \(1, -0.5\).*choose cat"),
        (Combination("dare_ties_svd", 0.5), (-1, 0.5, 1), "opposite sign"),
    ],
)
def test_what_a_method_cannot_do_is_refused(
    combination: Combination, weights: Sequence[float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check(combination, weights)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_can_do_passes(method: str) -> None:
    assert check(how(method), (1.0, 0.5)) == ()
    assert check(how(method), (-1.0, -0.5)) == ()


def test_one_adapter_is_told_that_nothing_is_combined() -> None:
    assert check(how("cat"), (1.0,)) == ()
    (fact,) = check(how("ties"), (1.0,))
    assert "without ties" in fact


def test_the_rank_is_the_largest_that_any_config_has() -> None:
    configs = [{"r": 4}, {"r": 8, "rank_pattern": {"q_proj": 2, "v_proj": 16}}, {}]
    assert settled(how("svd"), configs).rank == 16
    assert settled(how("ties_svd"), configs[:1]).rank == 4
    assert settled(how("svd", rank=3), configs).rank == 3
    assert settled(how("svd"), [{}]).rank is None
    masks = {"r": 8, "rank_pattern": {"q_proj": [True, False]}}  # AdaLoRA's
    assert settled(how("svd"), [masks]).rank == 8
    assert settled(how("cat"), configs).rank is None


@pytest.mark.parametrize(
    ("method", "edits", "message"),
    [
        ("linear", [lora(1), lora(2, 3)], "one rank, got 4, 3.*choose cat, the exact sum, or svd"),
        ("ties", [lora(1), lora(2, 3)], "or ties_svd"),
        ("ties", [lora(1), Full(random(1, 60, 44))], "adapter 2 has others.*or ties_svd"),
        ("cat", [Multiplied(), lora(1)], "adapter 1 does not add to .*up_proj"),
        ("linear", [lora(1), Multiplied()], "adapter 2 does not add"),
        ("ties_svd", [None, Multiplied()], "adapter 2 does not add"),
        (
            "magnitude_prune",
            [lora(1, 1), lora(2, 1)],
            "keeps none of the 44 .* lora_A of adapter 1",
        ),
    ],
)
def test_adapters_that_a_method_cannot_take_are_refused(
    method: str, edits: list[object], message: str
) -> None:
    combination = how(method, density=0.01) if method == "magnitude_prune" else how(method)
    with pytest.raises(AdapterError, match=message):
        combined(edits, (1, 1), combination, TARGET)  # type: ignore[arg-type]


def test_scalings_are_sent_to_the_method_that_sums_them() -> None:
    edits = [Scaling(constant("l", random(seed, 1, 44)), False, "w") for seed in (1, 2)]
    with pytest.raises(AdapterError, match="choose linear, which sums the scalings of IA3"):
        combined(edits, (1, 1), how("cat"), TARGET)
    rows = combined(edits, (1, 0.5), how("linear"), TARGET).apply(np.ones((3, 44), "f4"), 0, 3, 1)
    np.testing.assert_allclose(rows[2], random(1, 44) + 0.5 * random(2, 44), rtol=1e-6)


def test_messages_name_the_adapters() -> None:
    with pytest.raises(AdapterError, match="chat does not add"):
        combined([Multiplied(), lora(1)], (1, 1), how("cat"), TARGET, names=["chat", "maths"])


def test_a_bias_has_an_exact_sum_only() -> None:
    target = Target("lm_head.bias", (44,), "bias")
    edits = [Full(random(1, 1, 44)), Full(random(2, 1, 44))]
    sum_ = combined(edits, (1, 2), how("cat"), target).apply(np.zeros((1, 44), np.float32), 0, 1, 1)
    np.testing.assert_allclose(sum_, edits[0].values + 2 * edits[1].values, rtol=1e-6)
    with pytest.raises(AdapterError, match=r"ties_svd combines matrices.*choose cat"):
        combined(edits, (1, 2), how("ties_svd"), target)


def test_a_change_without_a_rank_needs_one_for_svd() -> None:
    edits = [Full(random(1, 60, 44)), lora(2)]
    with pytest.raises(UsageError, match=r"adapter 1 has none.*--combine-rank"):
        combined(edits, (1, 1), how("svd"), TARGET)
    delta = whole(combined(edits, (1, 1), how("svd", rank=44), TARGET))
    np.testing.assert_allclose(delta, exact(edits, (1, 1)), atol=1e-4)


# Sums


def test_cat_is_the_exact_sum_of_any_additive_changes() -> None:
    edits: list[LowRank | Full] = [lora(1), Full(random(3, 60, 44)), lora(2, 7)]
    weights = (0.5, -2.0, 1.0)
    edit = combined(edits, weights, how("cat"), TARGET)
    np.testing.assert_allclose(whole(edit), exact(edits, weights), rtol=1e-5, atol=1e-5)
    rows = edit.apply(np.ones((60, 44), np.float32), 0, 60, 2.0)
    np.testing.assert_allclose(rows, 1 + 2 * exact(edits, weights), rtol=1e-4, atol=1e-4)


def test_cat_of_lora_is_lora_of_all_ranks() -> None:
    edits = [lora(1), lora(2, 7), lora(3, 1)]
    edit = combined(edits, WEIGHTS, how("cat"), TARGET)
    assert isinstance(edit, LowRank)
    assert edit.rank == 12
    np.testing.assert_allclose(
        edit.b.load().astype(np.float64) @ edit.a.load(), exact(edits, WEIGHTS), atol=1e-4
    )


def test_one_adapter_applies_alone_whatever_its_kind() -> None:
    rows = random(1, 60, 44)
    alone = combined([Multiplied()], [0.5], how("ties"), TARGET)
    np.testing.assert_array_equal(alone.apply(rows, 0, 60, 2.0), rows * 2)
    by_cat = combined([None, Multiplied()], [1.0, 0.5], how("cat"), TARGET)
    np.testing.assert_array_equal(by_cat.apply(rows, 0, 60, 1.0), rows * np.float32(1.5))


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (5, 60), (60, 5)])
def test_svd_is_the_nearest_of_its_rank(rank: int, shape: tuple[int, int]) -> None:
    """Within float32's rounding of the SVD of the exact sum."""
    target = replace(TARGET, shape=shape)
    edits = [lora(1, 4, shape), lora(2, 7, shape), lora(3, 1, shape)]
    edit = combined(edits, WEIGHTS, how("svd", rank=rank), target)
    matrix = sum(
        weight * each.scale * (each.b.load().astype(np.float64) @ each.a.load())
        for each, weight in zip(edits, WEIGHTS, strict=True)
    )
    assert edit.rank == min(rank, *shape)
    assert_nearest(edit.delta(0, shape[0]), matrix, rank)


@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_whole_matrix_is_cut_to_the_nearest_of_its_rank(
    shape: tuple[int, int], rank: int
) -> None:
    matrix = random(1, *shape)
    a, b = truncated(matrix, min(rank, *shape))
    assert_nearest(b @ a, matrix, rank)


@pytest.mark.parametrize("shape", [(700, 640), (640, 700)])
@pytest.mark.parametrize("count", [0, 2, 12])
def test_a_large_matrix_is_sought_through_and_not_squared(
    shape: tuple[int, int], count: int
) -> None:
    """More values than wanted, some noise, as pruned adapters are; fewer, and nothing but zeros."""
    matrix = random(2, shape[0], count) @ random(3, count, shape[1])
    if count == 12:
        matrix += np.float32(0.01) * random(1, *shape)
    assert _sought(matrix if shape[0] >= shape[1] else matrix.T, 4) is not None
    a, b = truncated(matrix, 4)
    assert_nearest(b @ a, matrix, 4)


def test_a_matrix_of_noise_is_squared_and_solved_whole() -> None:
    matrix = random(1, 800, 600)
    assert _sought(matrix, 8) is None
    a, b = truncated(matrix, 8)
    assert_nearest(b @ a, matrix, 8)


def assert_nearest(delta: Array, matrix: npt.NDArray[np.floating], rank: int) -> None:
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.abs(delta - nearest).max() <= 1e-6 * s[0]


# Pruning


@pytest.mark.parametrize("count", [1, 2, 100, 1999, 2000])
def test_the_largest_are_kept(count: int) -> None:
    values = random(1, 100, 20)
    pruned = values.copy()
    LargestKept(constant("values", values), count).prune(pruned, 0)
    expected = np.zeros(2000, np.float32)
    order = np.argsort(-np.abs(values.reshape(-1)), kind="stable")[:count]
    expected[order] = values.reshape(-1)[order]
    np.testing.assert_array_equal(pruned, expected.reshape(100, 20))


@pytest.mark.parametrize("count", [1, 60, 777, 1200])
def test_of_equals_those_of_the_first_rows_are_kept(count: int) -> None:
    """Adapters in bfloat16 or float16 hold many equals. Slabs must not count for themselves."""
    values = np.round(random(1, 3, 400) * 2) / 2
    values[0, 0] = -0.0
    values = np.ascontiguousarray(values.reshape(100, 12))
    expected = np.zeros(1200, np.float32)
    order = np.argsort(-np.abs(values.reshape(-1)), kind="stable")[:count]
    expected[order] = values.reshape(-1)[order]
    kept = LargestKept(constant("values", values), count)
    pruned = values.copy()
    for start in (63, 20, 0):
        stop = {63: 100, 20: 63, 0: 20}[start]
        kept.prune(pruned[start:stop], start)
    np.testing.assert_array_equal(pruned.reshape(-1), expected)


def test_a_tensor_of_many_slabs_is_pruned_as_a_whole() -> None:
    columns = 1 << 16
    rows = 3 * SLAB_BYTES // (4 * columns)
    values = np.round(random(1, rows, columns) * 4)
    count = values.size // 3
    pruned = values.copy()
    LargestKept(constant("values", values), count).prune(pruned, 0)
    expected = np.sort(np.abs(values), axis=None)[-count:]
    np.testing.assert_array_equal(np.sort(np.abs(pruned), axis=None)[-count:], expected)
    assert np.count_nonzero(pruned) == count


def test_masks_are_the_same_however_rows_are_cut() -> None:
    masks, masked = SeededMasks(7), Masked(1, "w", "b", 37)
    mask = masks.keep(masked, 0, 100, 0.3)
    pieces = [masks.keep(masked, start, stop, 0.3) for start, stop in ((0, 1), (1, 50), (50, 100))]
    np.testing.assert_array_equal(np.concatenate(pieces), mask)


def test_masks_keep_the_share_and_differ_by_what_they_are_for() -> None:
    first = Masked(0, "w", "a", 500)
    others = [replace(first, adapter=1), replace(first, target="v"), replace(first, factor="b")]
    mask = SeededMasks(0).keep(first, 0, 400, 0.3)
    assert abs(mask.mean() - 0.3) < 0.005  # five standard deviations
    for other in [SeededMasks(1).keep(first, 0, 400, 0.3)] + [
        SeededMasks(0).keep(each, 0, 400, 0.3) for each in others
    ]:
        assert abs((mask & other).mean() - 0.09) < 0.005
    assert SeededMasks(0).keep(first, 0, 4, 1 - 1e-12).all()


def test_masks_are_the_raw_stream_of_philox() -> None:
    """A recipe's seed must give the same bytes for ever: by the paper, not by numpy's wish."""
    text = b"\0".join((b"3", b"2", b"model.norm.weight", b"delta"))
    key = hashlib.sha256(text).digest()[:16]
    words = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")]
    draws = []
    for counter in range(1, 41):  # numpy counts before it draws
        for word in philox4x64(counter, *words):
            draws += [word & 0xFFFFFFFF, word >> 32]
    mask = SeededMasks(3).keep(Masked(2, "model.norm.weight", "delta", 20), 0, 16, 0.25)
    np.testing.assert_array_equal(mask.reshape(-1), np.array(draws) < 2**30)


def philox4x64(counter: int, key_low: int, key_high: int) -> tuple[int, int, int, int]:
    """One step of Philox4x64-10 (Salmon et al. 2011, section 3.3), counter below 2**64."""
    full = 2**64
    a, b, c, d = counter, 0, 0, 0
    for _ in range(10):
        high_a, low_a = divmod(0xD2E7470EE14C6C93 * a, full)
        high_c, low_c = divmod(0xCA5A826395121157 * c, full)
        a, b, c, d = high_c ^ b ^ key_low, low_c, high_a ^ d ^ key_high, low_a
        key_low = (key_low + 0x9E3779B97F4A7C15) % full
        key_high = (key_high + 0xBB67AE8584CAA73B) % full
    return a, b, c, d


def test_two_adapters_of_the_same_values_are_masked_apart() -> None:
    edit = combined([lora(1), lora(1)], (1, -1), how("dare_linear_svd"), TARGET)
    assert np.abs(whole(edit)).max() > 0.1


# Laziness and determinism


def counted(ref: TensorRef, loads: list[int]) -> TensorRef:
    def load_rows(start: int, stop: int) -> Array:
        loads.append(stop - start)
        return ref.load_rows(start, stop)

    return replace(ref, load_rows=load_rows)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_before_rows_are_asked_for(method: str) -> None:
    loads: list[int] = []
    edits = [
        replace(edit, a=counted(edit.a, loads), b=counted(edit.b, loads))
        for edit in (lora(1), lora(2))
    ]
    edit = combined(edits, (1, 1), how(method), TARGET)
    assert not loads
    edit.apply(np.zeros((3, 44), np.float32), 0, 3, 1.0)
    assert loads


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_do_not_depend_on_cuts_or_threads(method: str) -> None:
    def edit() -> LowRank:
        result = combined([lora(1), None, lora(2)], WEIGHTS, how(method), TARGET)
        assert isinstance(result, LowRank)
        return result

    expected = whole(edit())
    shared = edit()
    cuts = [(40, 60), (0, 1), (33, 40), (1, 33)]
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda cut: shared.delta(*cut), cuts))
    for (start, stop), piece in zip(cuts, pieces, strict=True):
        np.testing.assert_array_equal(piece, expected[start:stop])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.prune == "random"])
def test_the_seed_decides_what_is_dropped(method: str) -> None:
    edits = [lora(1), lora(2)]
    one, same, other = (
        whole(combined(edits, (1, 1), how(method, seed=seed), TARGET)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", ["a", "b"])
def test_nan_is_never_pruned_away(method: str, factor: str) -> None:
    """It must reach whoever looks for it, or be found here."""
    values = getattr(lora(1), factor).load()
    values[2, 3] = np.nan
    edits = [replace(lora(1), **{factor: constant("damaged", values)}), lora(2)]
    edit = combined(edits, (1, 1), how(method), TARGET)
    if METHODS[method].truncate or (method, factor) == ("cat", "a"):
        with pytest.raises(TensorError, match="holds nan"):
            whole(edit)
    else:
        assert np.isnan(whole(edit)).any()


def test_values_that_no_one_agrees_on_are_zero_and_ties_go_to_plus() -> None:
    """Two adapters of rank 1; B is all ones, so the change is what A became."""
    ones = constant("b", np.ones((2, 1)))
    edits = [
        LowRank(constant("a", [values]), ones, 1.0)
        for values in ([1.0, 2.0, -3.0, -1.0, 0.0], [-1.0, 1.0, 1.0, -2.0, 0.0])
    ]
    target = Target("w", (2, 5), "linear")
    delta = combined(edits, (1, 1), Combination("ties", density=1.0), target).delta(0, 1)
    np.testing.assert_array_equal(delta, [[1.0, 1.5, -3.0, -1.5, 0.0]])
    by_number = Combination("ties", density=1.0, sign="frequency")
    delta = combined(edits, (1, 1), by_number, target).delta(0, 1)
    np.testing.assert_array_equal(delta, [[1.0, 1.5, 1.0, -1.5, 0.0]])
