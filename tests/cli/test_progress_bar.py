"""Progress: a bar where there is a terminal, lines where there is none, nothing when quiet."""

from __future__ import annotations

import io
import re

import pytest

from edgellm.cli import render
from edgellm.cli.progress_bar import progress_shown
from edgellm.progress import ProgressEvent

EVENTS = (
    ProgressEvent("quantize", "blk.0", 25_000_000, 100_000_000, 1, 4),
    ProgressEvent("quantize", "blk.1", 50_000_000, 100_000_000, 2, 4),
    ProgressEvent("quantize", "blk.3", 100_000_000, 100_000_000, 4, 4),
    ProgressEvent("checksum", "model.gguf", 0, 100_000_000),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds between any two looks at the clock."""
    ticks = iter(range(0, 100_000, 10))
    monkeypatch.setattr("edgellm.cli.progress_bar.time.monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_lines_have_tensors_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown() as progress:
        for event in EVENTS:
            progress(event)
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.splitlines() == [
        "quantize   50%  2/4 tensors  50 MB  5 MB/s  10 s left",
        "quantize  100%  4/4 tensors  100 MB  5 MB/s  in 20.0 s",
    ]


@pytest.mark.usefixtures("clock")
def test_steps_without_bytes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown() as progress:
        for done in (1, 2):
            progress(ProgressEvent("check", f"layer {done}", 0, 0, done, 30))
    assert capsys.readouterr().err == "check     layer 2, 2/30, 140 s left\n"


def test_notes_go_on_below_themselves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "a note of the kind that is longer than the terminal is wide"
    for shown, stream in ((render.show_notes, "stdout"), (render.say_notes, "stderr")):
        terminal, pipe = Terminal(), io.StringIO()
        monkeypatch.setattr(f"sys.{stream}", terminal)
        shown([line])
        assert terminal.getvalue() == (
            "  · a note of the kind that is longer\n    than the terminal is wide\n"
        )
        monkeypatch.setattr(f"sys.{stream}", pipe)
        shown([line])
        assert pipe.getvalue() == f"  · {line}\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_shown() as progress:
        for event in EVENTS:
            progress(event)
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert re.search(r"quantize.*━.*4/4 tensors  100 MB  \d+ MB/s", shown)
    assert "checksum" in shown


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown(quiet=True) as progress:
        for event in EVENTS:
            progress(event)
    assert capsys.readouterr() == ("", "")
