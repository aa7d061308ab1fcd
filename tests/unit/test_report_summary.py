"""The sentences: a winner only where the evidence names one."""

from __future__ import annotations

from edgellm.profiling.document import Cell, Profile
from edgellm.report.rows import machine_names
from edgellm.report.summary import Sentence, summary
from edgellm.report.wording import listed, moment, number, places, plain, seconds, seconds_of, size

from . import profile_documents as documents


def said(*cells: Cell, topic: str = "Speed", **changed: object) -> Sentence:
    found = [each for each in summary([documents.profile(cells, **changed)]) if each.topic == topic]
    assert len(found) == 1
    return found[0]


def topics(*profiles: Profile) -> list[str]:
    return [each.topic for each in summary(profiles)]


def test_the_fastest_is_named_where_intervals_lie_apart() -> None:
    sentence = said(documents.cell("slow", 20), documents.cell("fast", 30))
    assert sentence.text == (
        "fast writes fastest: 30.0 tokens/s (29.4 to 30.6); 1.50 times as fast as the next, slow "
        "with 20.0 tokens/s (19.6 to 20.4)."
    )
    assert not sentence.warns


def test_no_winner_where_intervals_overlap() -> None:
    sentence = said(documents.cell("a", 30), documents.cell("b", 30.9), documents.cell("c", 10))
    assert sentence.text.startswith("No one is named fastest: the best median is that of b, 30.9")
    assert "its interval overlaps that of a." in sentence.text
    assert sentence.warns


def test_no_winner_where_a_side_is_noisy() -> None:
    for noisy in (("fast",), ("slow",)):
        cells = [
            documents.cell(name, speed, noisy=("stolen time",) if name in noisy else ())
            for name, speed in (("slow", 20.0), ("fast", 30.0))
        ]
        sentence = said(*cells)
        assert sentence.text.startswith("No one is named fastest")
        assert f"{noisy[0]} is noisy" in sentence.text


def test_many_noisy_cells_are_told_together() -> None:
    noise = ("other programs had {}% of the CPU time (1.01 s)",)
    cells = [
        documents.cell(f"q{n}", 20 + n, noisy=(noise[0].format(90 + n),), run=run)
        for n, run in enumerate([documents.settings(threads=1)] * 3 + [documents.settings()] * 2)
    ]
    assert said(*cells, topic="Noisy").text == (
        "5 of 5 cells may mislead. Other programs had 90% to 94% of the CPU time."
    )
    text = said(*cells).text
    assert "all 5 are noisy." in text
    assert text.startswith("No one is named fastest: the best median is that of q4 · 2 threads, 2")
    assert "q0 · 1 thread " in said(*cells, topic="Memory").text
    assert "both are noisy" in said(*cells[:2]).text
    few = said(*cells[:2], topic="Noisy").text
    assert few.startswith("2 of 2 cells may mislead. q0: other programs had 90%")


def test_cells_are_named_by_what_differs_among_those_compared() -> None:
    other = documents.artifact("other", model_sha256="c" * 64)
    genai = documents.settings(runtime="onnxruntime-genai", kv_cache="f32")
    cells = [
        documents.cell("a", 20), documents.cell("b", 30), documents.cell("o", of=other, run=genai)
    ]  # fmt: skip
    speeds = [each.text for each in summary([documents.profile(cells)]) if each.topic == "Speed"]
    assert speeds[0].startswith("b writes fastest")
    assert speeds[1].startswith("other writes")


def test_no_winner_of_few_rounds() -> None:
    sentence = said(documents.cell("a", 20, rounds=3), documents.cell("b", 30, rounds=3))
    assert "3 rounds are too few to tell" in sentence.text
    setting = said(documents.cell("a", 20, rounds=3), topic="Compared")
    assert "In brackets: the least and the largest sample." in setting.text


def test_the_first_token_soonest_is_the_shortest() -> None:
    sentence = said(documents.cell("slow", 20), documents.cell("fast", 40), topic="First token")
    assert sentence.text == (
        "fast gives its first token soonest: 400 ms (392 to 408); the next, slow, takes 2.00 times "
        "as long, 800 ms (784 to 816)."
    )


def test_only_cells_of_equal_lengths_are_compared() -> None:
    long = documents.cell("long", 90, run=documents.settings(512))
    sentence = said(long, documents.cell("a", 20), documents.cell("b", 30))
    assert "long" not in sentence.text


def test_one_sample_has_no_interval() -> None:
    assert seconds_of(documents.figure(0.5, rounds=1)) == "500 ms (one sample)"


def test_one_cell_is_told_without_a_race() -> None:
    sentence = said(documents.cell("only", 20))
    assert sentence.text == "only writes 20.0 tokens/s (19.6 to 20.4)."
    assert "noisy" in said(documents.cell("only", 20, noisy=("x",))).text


def test_memory_and_quality() -> None:
    cells = [
        documents.cell(name, 20, of=documents.artifact(name, size_bytes=size, kld_mean=kld))
        for name, size, kld in (("small", 90_000_000, 0.3), ("large", 150_000_000, 0.01))
    ]
    assert (
        "small takes least at its peak, 210 MB; large most, 270 MB"
        in said(*cells, topic="Memory").text
    )
    assert "large is nearest" in said(*cells, topic="Quality").text


def test_failures_are_named_and_a_failed_cell_wins_nothing() -> None:
    broken = documents.cell("broken", 90, failure="out of memory.")
    sentence = said(broken, documents.cell("good", 20), topic="Failed")
    assert sentence.text == "1 of 2 cells. broken: out of memory."
    assert "broken" not in said(broken, documents.cell("good", 20)).text


def test_all_failed_is_said() -> None:
    assert topics(documents.profile([documents.failed("a", "no")])) == [
        "Nothing measured", "Failed",
    ]  # fmt: skip


def test_interrupted_and_versions_are_said() -> None:
    assert "Interrupted" in topics(documents.profile([documents.cell()], interrupted=True))
    older = documents.cell("older", runtime_version="0.3.16")
    text = said(documents.cell(), older, topic="Unlike versions").text
    assert text.startswith("llamacpp: 0.3.36 and 0.3.16.")


def test_machines_with_nothing_in_common_are_not_compared() -> None:
    other = documents.profile(
        [documents.cell("elsewhere")], conditions=documents.conditions("ARM Cortex-A76")
    )
    sentences = summary([documents.profile([documents.cell("here")]), other])
    assert "nothing compares them" in next(
        each.text for each in sentences if each.topic == "Machines"
    )


def test_machines_of_one_processor_are_told_apart() -> None:
    first = documents.profile([])
    bigger = documents.profile([], conditions=documents.conditions(physical_cores=8))
    assert machine_names([first, bigger]) == [
        "Intel Xeon Platinum 8375C, 2 cores",
        "Intel Xeon Platinum 8375C, 8 cores",
    ]
    assert len(set(machine_names([first, first]))) == 1


def test_figures_as_people_read_them() -> None:
    assert [number(each) for each in (1234.5, 12.34, 0.0123, 0)] == ["1,234", "12.3", "0.0123", "0"]
    assert [seconds(each) for each in (0.0852, 1.2, 0.000045, 303, 7300)] == [
        "85.2 ms", "1.20 s", "45.0 µs", "5 min 3 s", "2.0 h",
    ]  # fmt: skip
    assert seconds_of(documents.figure(0.5)) == "500 ms (490 to 510)"
    assert [size(each) for each in (0, 999, 91_700_000, 1.24e9)] == [
        "0 B", "999 B", "91.7 MB", "1.24 GB",
    ]  # fmt: skip
    assert places(99.96) == 1
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdef"), 2) == "a, b and 4 more"
    assert moment("2026-03-01T14:05:09+00:00") == "2026-03-01 14:05 UTC"
    assert moment("yesterday") == "yesterday"
    assert plain("a\u202eb\n c\x00") == "a b c"
