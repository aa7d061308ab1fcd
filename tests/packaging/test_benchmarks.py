"""Benchmarks measure what happened: peak memory, wall, turns of a pair, commands as shown."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the installed package
    sys.path.append(str(ROOT))

from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import int4, measure, places, results, tune  # noqa: E402
from benchmarks.results import Comparison, Result  # noqa: E402
from benchmarks.text import unseen_paragraphs  # noqa: E402

MEGABYTE = 1 << 20


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(int4, "WORK", tmp_path)
    monkeypatch.setattr(measure, "WORK", tmp_path)
    monkeypatch.setattr(places, "WORK", tmp_path)
    monkeypatch.setattr(measure, "PAUSE_S", 0.0)
    monkeypatch.setattr(os, "sync", lambda: None)
    return tmp_path


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def first_child(command: list[str], tmp_path: Path) -> measure.Run:
    """Measured from a process as small as the one that benchmarks run in."""
    code = (
        "import dataclasses, json, pathlib, sys\n"
        "from benchmarks import measure\n"
        f"measure.WORK = pathlib.Path({str(tmp_path)!r})\n"
        f"print(json.dumps(dataclasses.asdict(measure.run({command!r}))))"
    )
    environment = places.environment(command) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return measure.Run(**json.loads(done.stdout))


def test_peak_memory_counts_what_was_freed_and_what_was_mapped(tmp_path: Path) -> None:
    plain = first_child(python("pass"), tmp_path).peak_memory_bytes
    assert plain < 40 * MEGABYTE
    freed = first_child(python(f"x = b'1' * {100 * MEGABYTE}; del x"), tmp_path).peak_memory_bytes
    assert 90 < (freed - plain) / MEGABYTE < 110
    file = tmp_path / "mapped"
    file.write_bytes(b"\0" * 100 * MEGABYTE)
    mapping = (
        f"import mmap; f = open({str(file)!r}, 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096])"
    )
    mapped = first_child(python(mapping), tmp_path).peak_memory_bytes
    assert 90 < (mapped - plain) / MEGABYTE < 110


def test_wall_and_first_output_are_told_apart(work: Path) -> None:
    code = "import time; time.sleep(0.2); print('a', flush=True); time.sleep(0.3); print('b')"
    done = measure.run(python(code), read_stdout=True)
    assert done.first_output_s is not None
    assert 0.2 <= done.first_output_s <= done.wall_s - 0.3


def test_a_failing_command_is_an_error_with_its_last_words(work: Path) -> None:
    with pytest.raises(measure.CommandFailed, match="ended with 3:\nlast words"):
        measure.run(python("print('last words', flush=True); raise SystemExit(3)"))


def test_measured_programs_see_no_settings_of_threads(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    measure.run(python("import os; raise SystemExit('OMP_NUM_THREADS' in os.environ)"))


def test_pairs_take_turns_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []

    def call(name: str) -> int:
        order.append(name)
        return len(order)

    found = measure.interleaved(lambda: call("a"), lambda: call("b"), pairs=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert found == ([3, 5], [4, 6])


def test_a_loop_answers_round_by_round_and_its_end_is_told(work: Path) -> None:
    code = (
        "import json, sys\nprint(json.dumps({}), flush=True)\n"
        "for n, _ in enumerate(sys.stdin):\n"
        "    if n == 2: raise SystemExit('out of rounds')\n"
        "    print(json.dumps({'n': n}), flush=True)\n"
    )
    with measure.Loop(python(code)) as loop:
        assert [loop.round()["n"], loop.round()["n"]] == [0, 1]
        with pytest.raises(measure.CommandFailed, match="out of rounds"):
            loop.round()


def test_shown_commands_hold_no_path_of_the_machine() -> None:
    command = [sys.executable, str(places.LOOPS / "genai_loop.py"), "model", "what is it?"]
    command += [str(places.WORK / "model"), str(places.PEERS / "bin" / "python")]
    program = Path(sys.executable).name
    assert places.shown(command) == (
        f"{program} benchmarks/loops/genai_loop.py model 'what is it?' model python"
    )


def test_a_run_that_was_killed_leaves_nothing_to_go_on_from(work: Path) -> None:
    for name in (".out.12.partial", ".other.12.partial", "out"):
        (work / name / "journal").mkdir(parents=True)
    measure.fresh("out", "absent")
    assert [each.name for each in work.iterdir()] == [".other.12.partial"]


def test_text_to_calibrate_on_repeats_nothing_of_what_is_judged_by() -> None:
    """The language reference says two fifths of the judged text again further on."""
    judged = "one two three four five six seven eight nine ten\n\nand more of it"
    copied = "so two three four five\nsix seven eight nine they say"
    fresh = ["a paragraph that was not there before, of more than eight words", "a short one"]
    rest = "\n\n".join([fresh[0], copied, fresh[1], fresh[0] + " once more"])
    assert unseen_paragraphs(judged, rest) == "\n\n".join(fresh)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"setting": "other"}, "setting"),
        ({"facts": {"text_sha256": "1"}}, "text"),
        ({"facts": {"training_text_sha256": "1"}}, "text"),
        ({}, ""),
    ],
)
def test_types_measured_apart_stand_in_one_table_only_where_all_else_is_alike(
    change: dict[str, Any], says: str
) -> None:
    def result(name: str, figure: float, **change: Any) -> Result:
        facts = {"text_sha256": "0", "training_text_sha256": "0"} | change.pop("facts", {})
        found = {"figures": {name: figure}, "sizes": {}, "tuning": {}}
        given = {"benchmark": "tune", "peer": "", "setting": "s"} | change
        row = Comparison(f"{name}, KL", "nats", [figure])
        return Result(
            **given,
            comparisons=[row],
            commands={name: name},
            facts=facts | found,
            machine=results.machine(),
            versions={"ours": results.installed_versions()},
        )

    kept, found = result("q4_0", 1.0, **change), result("iq4_xs", 2.0)
    if says:
        with pytest.raises(ValueError, match=f"differ in {says}: measure all types"):
            tune.merged(found, kept)
        return
    both = tune.merged(found, kept)
    assert [row.ours for row in both.comparisons] == [[1.0], [2.0]]
    assert both.facts["figures"] == {"q4_0": 1.0, "iq4_xs": 2.0}
    again = tune.merged(result("q4_0", 3.0), both)
    assert [row.ours for row in again.comparisons] == [[3.0], [2.0]]


def test_ratios_are_judged_pair_by_pair() -> None:
    drifting = Comparison("wall", "s", [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], at_most=0.5)
    assert drifting.ratios == [0.5, 0.5, 0.5]
    assert drifting.met
    assert Comparison("decode", "tokens/s", [9.0], [10.0], at_least=0.98).met is False
    assert Comparison("size", "bytes", [9.0]).met is None


def found(kl: float, grid: str, *, weights: int = 210) -> dict[str, Any]:
    return {"kl": kl, "rounded": {grid: weights}, "floats": ["token_embd.weight"]}


def test_the_best_peer_is_named_and_all_must_have_rounded_the_same() -> None:
    of = {"edgellm": found(0.2, "int4-g64"), "a": found(0.5, "int4-g64")}
    of["b"] = found(0.4, "int4-g64")
    assert int4._against_the_best("int4-g64", of) == Comparison(
        "int4-g64; b", "nats", [0.2], [0.4], at_most=1.0
    )
    assert int4._weights({"int4-g64": of}) == 210
    with pytest.raises(ValueError, match="a rounds other weights than asked for at int4-g64"):
        int4._weights({"int4-g64": of | {"a": found(0.1, "int4-g32")}})
    with pytest.raises(ValueError, match="a rounds other weights"):
        int4._weights({"int4-g64": of | {"a": of["a"] | {"floats": []}}})
    with pytest.raises(ValueError, match=r"different numbers of weights: \[209, 210\]"):
        int4._weights({"int4-g64": of | {"a": found(0.1, "int4-g64", weights=209)}})


def test_a_peers_folder_is_made_and_judged_once_and_again_when_what_it_was_made_of_changes(
    work: Path,
) -> None:
    judge = python(
        "import json, pathlib; print(json.dumps("
        "{'out': {'kl': float(pathlib.Path('out', 'kl').read_text())}}))"
    )

    def ask(which: str, made_of: str, kl: float) -> dict[str, Any]:
        code = "import pathlib, sys; f = pathlib.Path('out'); f.mkdir(); (f / 'kl').write_text"
        command = python(f"{code}('{kl}')")
        return int4._found_once(
            which, {"packages": made_of}, "out", command, judge, work / "peers" / "kept.json"
        )

    assert ask("a", "a==1", 0.5) == {"kl": 0.5}
    assert ask("a", "a==1", 0.25) == {"kl": 0.5}
    assert ask("b", "a==1", 0.75) == {"kl": 0.75}
    assert ask("a", "a==2", 0.25) == {"kl": 0.25}
    assert ask("b", "a==1", 0.0) == {"kl": 0.75}


@pytest.mark.parametrize("name", command_line.BENCHMARKS)
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").measure)
