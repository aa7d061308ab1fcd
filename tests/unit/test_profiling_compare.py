"""Profiles against each other: like with like, intervals, and conditions that stop a build."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgellm.errors import SourceError, UsageError
from edgellm.profiling import document
from edgellm.profiling.comparing import compare
from edgellm.profiling.document import read_profile, to_json
from edgellm.profiling.intervals import distribution, figure

FAST, SLOW = [100.0, 101, 99, 100, 102, 98], [80.0, 81, 79, 80, 82, 78]


def cell(speeds: list[float], name: str = "small", **changes: object) -> document.Cell:
    facts = document.ArtifactFacts(
        name=name, container="onnx", sha256=name, model_sha256="base", size_bytes=10
    )
    given: dict[str, object] = {
        "runtime": "onnxruntime", "device": "cpu", "threads": None, "kv_cache": "f32",
        "prompt_tokens": 512, "new_tokens": 128,
    }  # fmt: skip
    noisy = changes.pop("noisy", ())
    settings = document.Settings(**(given | changes))  # type: ignore[arg-type]
    return document.Cell(
        name=f"{name}, {settings.runtime}",
        artifact=facts,
        settings=settings,
        rounds=len(speeds),
        decode_tokens_per_s=figure(speeds),
        noisy=noisy,  # type: ignore[arg-type]
    )


def of(*cells: document.Cell, cpu: str = "A CPU") -> document.Profile:
    gauge = document.Gauge()
    conditions = document.Conditions(
        cpu=cpu, cpu_features=(), physical_cores=2, memory_bytes=1 << 33, gpus=(), os="Linux",
        python="3.11", versions={}, before=gauge, after=gauge,
    )  # fmt: skip
    return document.Profile(
        edgellm="0", started="2026-01-01T00:00:00+00:00", seconds=1.0,
        method=document.Method(command="", rounds=6, warmup_rounds=1),
        conditions=conditions, limits=(), cells=cells,
    )  # fmt: skip


def test_the_same_cell_of_two_runs_is_compared_by_medians() -> None:
    found = compare([("a", of(cell(FAST))), ("b", of(cell(SLOW)))])
    (pair,) = found.pairs
    assert (pair.of, pair.to) == ("b: small, onnxruntime", "a: small, onnxruntime")
    assert (pair.of_median, pair.to_median) == (80, 100)
    assert pair.ratio.median == pytest.approx(0.8)
    assert 0.75 < pair.ratio.low <= 0.8 <= pair.ratio.high < 0.85
    assert pair.verdict == "slower"
    assert compare([("a", of(cell(SLOW))), ("b", of(cell(FAST)))]).pairs[0].verdict == "faster"


def test_what_noise_or_chance_may_have_done_is_no_difference() -> None:
    noisy = cell(SLOW, noisy=("others took 10 % of the CPUs",))
    same = [99.5, 100.5, 101, 99, 100, 103]
    for other, verdict in ((cell(same), "no difference shown"), (noisy, "noisy, not judged")):
        found = compare(
            [("a", of(cell(FAST))), ("b", of(other))], fail_if=["decode_tokens_per_s < -1%"]
        )
        assert found.pairs[0].verdict == verdict
        assert found.failed == ()


@pytest.mark.parametrize(
    ("condition", "fails"),
    [
        ("decode_tokens_per_s < -5%", True),
        ("decode_tokens_per_s<-19.5 %", True),
        ("decode_tokens_per_s < -21%", False),
        ("decode_tokens_per_s > -30%", True),
        ("decode_tokens_per_s > 5%", False),
    ],
)
def test_a_condition_fails_where_the_change_is_certain(condition: str, fails: bool) -> None:
    found = compare([("a", of(cell(FAST))), ("b", of(cell(SLOW)))], fail_if=[condition])
    assert bool(found.failed) == fails


@pytest.mark.parametrize("text", ["decode < -5%", "decode_tokens_per_s -5%", "load_s < 5"])
def test_a_condition_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="decode_tokens_per_s < -5%"):
        compare([("a", of(cell(FAST))), ("b", of(cell(SLOW)))], fail_if=[text])


def test_unlike_runs_are_refused_with_what_differs_unless_told_to() -> None:
    runs = [("a", of(cell(FAST))), ("b", of(cell(SLOW, prompt_tokens=128)))]
    with pytest.raises(UsageError, match=r"prompt tokens 128 against 512.*--unlike"):
        compare(runs)
    found = compare(runs, unlike=True)
    assert len(found.pairs) == 1
    assert "prompt tokens 128 against 512" in found.differences[0]
    with pytest.raises(UsageError, match="artifact other against small"):
        compare([("a", of(cell(FAST))), ("b", of(cell(SLOW, "other")))])
    with pytest.raises(UsageError, match=r"machine B CPU.* against A CPU"):
        compare([("a", of(cell(FAST))), ("b", of(cell(SLOW), cpu="B CPU"))])


def test_a_refusal_of_many_cells_stays_short() -> None:
    cells = [cell(FAST, f"grid {number}") for number in range(30)]
    runs = [(name, of(*cells, cpu=f"{name} CPU")) for name in "ab"]
    with pytest.raises(UsageError, match="and 26 more such pairs") as refused:
        compare(runs)
    assert str(refused.value).count("a CPU") == 4
    assert len(compare(runs, unlike=True).differences) == 30, "who asks for all gets all"


def test_by_backend_compares_backends_and_not_grids_or_caches_of_one() -> None:
    mixed = of(
        cell(FAST, "q4"), cell(SLOW, "q8"), cell(SLOW, "q4", kv_cache="f16"),
        cell(SLOW, "q8", runtime="genai"),
    )  # fmt: skip
    found = compare([("a", mixed)], by="backend")
    assert [(pair.of, pair.to) for pair in found.pairs] == [("q8, genai", "q8, onnxruntime")]
    assert any(each.startswith("q4") for each in found.missing)


def test_by_machine_pairs_equal_thread_counts_and_never_one_machine_with_itself() -> None:
    cells = [cell(FAST, threads=each) for each in (1, 2)]
    found = compare([("a", of(*cells)), ("b", of(*cells, cpu="B CPU"))], by="machine")
    assert len(found.pairs) == 2
    assert all(pair.ratio.median == pytest.approx(1) for pair in found.pairs)
    assert {(pair.of[0], pair.to[0]) for pair in found.pairs} == {("b", "a")}
    other = compare([("a", of(cells[0])), ("b", of(cells[1], cpu="B CPU"))], by="machine")
    assert len(other.pairs) == 1, "machines have threads of their own"


def test_noise_says_nothing_about_memory() -> None:
    def peaking(peak: int) -> document.Cell:
        memory = document.Memory(peak_bytes=peak, steady_bytes=peak)
        return msgspec.structs.replace(cell(FAST, noisy=("others took 90 %",)), memory=memory)

    for peak, verdict in ((1000, "no difference shown"), (1500, "more")):
        found = compare([("a", of(peaking(1000))), ("b", of(peaking(peak)))])
        verdicts = {pair.quantity: pair.verdict for pair in found.pairs}
        assert verdicts["peak_memory_bytes"] == verdict
        assert verdicts["decode_tokens_per_s"] == "noisy, not judged"


def test_what_may_differ_is_said_and_works_within_one_file() -> None:
    one = of(cell(FAST), cell(SLOW, runtime="genai"), cell(SLOW, prompt_tokens=9))
    found = compare([("a", one)], by="backend")
    assert [(pair.of, pair.to) for pair in found.pairs] == [("small, genai", "small, onnxruntime")]
    two = of(cell(FAST), cell(SLOW, "other"))
    assert len(compare([("a", two)], by="quant").pairs) == 1
    machines = [("a", of(cell(FAST))), ("b", of(cell(SLOW), cpu="B CPU"))]
    assert len(compare(machines, by="machine").pairs) == 1
    with pytest.raises(UsageError, match="no two cells can be compared"):
        compare(machines, by="quant")
    with pytest.raises(UsageError, match="one profile has nothing to be compared with"):
        compare([("a", one)])
    with pytest.raises(UsageError, match="choose backend, machine, quant"):
        compare([("a", one)], by="os")


def test_another_base_model_is_never_compared_by_quant() -> None:
    other = msgspec.structs.replace(cell(SLOW, "other"), artifact=document.ArtifactFacts(
        name="x", container="onnx", sha256="x", model_sha256="another", size_bytes=1))  # fmt: skip
    with pytest.raises(UsageError, match="no two cells"):
        compare([("a", of(cell(FAST), other))], by="quant")


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(to_json(of(cell(FAST))))
    assert read_profile(path) == of(cell(FAST))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be understood as a profile"),
        (b"\xff\xfe", "cannot be understood as a profile"),
        (b"[]", "is JSON, but not a profile"),
        (b'{"kind": "another"}', "is JSON, but not a profile"),
        (b'{"kind": "edgellm profile", "schema_version": 99}', "has schema version 99"),
        (b'{"kind": "edgellm profile", "schema_version": 1}', "cannot be understood"),
    ],
)
def test_what_is_no_profile_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=said):
        read_profile(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        read_profile(tmp_path / "none.json")


def failing(one: document.Cell) -> document.Cell:
    return msgspec.structs.replace(one, rounds=0, decode_tokens_per_s=None, failure="it crashed")


def test_a_condition_of_what_nobody_measured_is_refused() -> None:
    with pytest.raises(UsageError, match=r"can never come true: .* have load_s"):
        compare([("a", of(cell(FAST))), ("b", of(cell(SLOW)))], fail_if=["load_s > 5%"])


@pytest.mark.parametrize("by", [None, "quant"])
def test_a_cell_that_failed_does_not_pass_a_gate(by: str | None) -> None:
    before = of(cell(FAST), cell(FAST, prompt_tokens=9))
    after = of(cell(FAST), failing(cell(FAST, prompt_tokens=9)))
    runs = [("a", before), ("b", after)]
    shown = compare(runs, by=by)
    assert shown.failed == ()
    assert shown.missing[0] == "b: small, onnxruntime failed: it crashed"
    assert "a: small, onnxruntime has figures, and" in shown.missing[1]
    found = compare(runs, by=by, fail_if=["decode_tokens_per_s < -5%"])
    assert found.failed == shown.missing
    assert compare([("a", before), ("b", before)], by=by, fail_if=["decode_tokens_per_s < -5%"]) \
        .failed == ()  # fmt: skip
    gone = compare([("a", before), ("b", of(cell(FAST)))], by=by, fail_if=["load_s < 1%"][:0])
    assert len(gone.missing) == 1


def test_what_is_not_certain_is_said_and_fails_nothing() -> None:
    noisy = cell(SLOW, noisy=("others took 10 % of the CPUs",))
    found = compare(
        [("a", of(cell(FAST))), ("b", of(noisy))], fail_if=["decode_tokens_per_s < -5%"]
    )
    assert found.failed == ()
    assert found.noisy == ("b: small, onnxruntime: others took 10 % of the CPUs",)
    (doubt,) = found.doubtful
    assert doubt.startswith("decode_tokens_per_s < -5%: b: small, onnxruntime differs by -20.0 %")


def test_unlike_cells_are_named_and_compared_when_told_to_by_anything() -> None:
    runs = [("a", of(cell(FAST))), ("b", of(cell(SLOW, prompt_tokens=9)))]
    with pytest.raises(UsageError, match=r"no two cells .*prompt tokens 9 against 512"):
        compare(runs, by="quant")
    found = compare(runs, by="quant", unlike=True)
    assert [(pair.of[0], pair.to[0]) for pair in found.pairs] == [("b", "a")]
    assert "prompt tokens 9 against 512" in found.differences[0]
    one = of(cell(FAST), cell(SLOW, runtime="genai"), cell(SLOW, prompt_tokens=9))
    (left,) = compare([("a", one)], by="backend").missing
    assert "prompt tokens 9 against 512" in left


def test_one_artifact_under_two_names_is_each_compared_with_itself() -> None:
    twice = of(cell(FAST), msgspec.structs.replace(cell(SLOW), name="again"))
    found = compare([("a", twice), ("b", twice)], fail_if=["decode_tokens_per_s < -5%"])
    assert [(pair.of, pair.to) for pair in found.pairs] == [
        ("b: small, onnxruntime", "a: small, onnxruntime"),
        ("b: again", "a: again"),
    ]
    assert (found.missing, found.failed) == ((), ())
    renamed = of(cell(FAST))
    found = compare([("a", twice), ("b", renamed)], fail_if=["decode_tokens_per_s < -5%"])
    assert (found.missing, found.failed) == ((), ())


def test_cells_of_one_run_are_compared_round_by_round() -> None:
    """Where both drift alike, pairs show what medians hide."""
    drift = [1.0, 2, 3, 4, 5, 6]
    slow, fast = [10 * n for n in drift], [12 * n for n in drift]
    one = of(cell(slow), cell(fast, runtime="genai"))
    (pair,) = compare([("a", one)], by="backend").pairs
    assert (pair.ratio.low, pair.ratio.high) == pytest.approx((1.2, 1.2))
    assert pair.verdict == "faster"
    apart = [("a", of(cell(slow))), ("b", of(cell(fast, runtime="genai")))]
    assert compare(apart, by="backend").pairs[0].verdict == "no difference shown"


@pytest.mark.parametrize("change", [{"batch": 8}, {"task": "label"}, {"prompt_tokens": 64}])
def test_encoders_are_compared_where_they_were_asked_the_same(change: dict[str, object]) -> None:
    """By the time of a batch too, a round's median each."""

    def texts(scale: float, **changed: object) -> document.Cell:
        asked: dict[str, object] = {"task": "embed", "new_tokens": 0, "batch": 4} | changed
        latencies = [scale * each for number in range(6) for each in (0.1, 0.2 + number / 1e3, 0.9)]
        return msgspec.structs.replace(
            cell([1.0] * 6, **asked),
            decode_tokens_per_s=None,
            latency_s=distribution(latencies),
            texts_per_s=figure([4 / scale + number / 1e3 for number in range(6)]),
        )

    found = compare([("a", of(texts(1.0))), ("b", of(texts(1.5)))], fail_if=["texts_per_s < -20%"])
    pairs = {pair.quantity: pair for pair in found.pairs}
    assert pairs.keys() == {"texts_per_s", "latency_s"}
    assert pairs["latency_s"].to_median == pytest.approx(0.2025)
    assert pairs["latency_s"].ratio.median == pytest.approx(1.5, rel=1e-2)
    assert pairs["texts_per_s"].verdict == pairs["latency_s"].verdict == "slower"
    assert len(found.failed) == 1
    with pytest.raises(UsageError, match=next(iter(change)).split("_")[0]):
        compare([("a", of(texts(1.0))), ("b", of(texts(1.0, **change)))])
