"""The chat of ``edgellm run``, typed into a real terminal."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")

CTRL_C, CTRL_D = "\x03", "\x04"


class Typist:
    """Someone at a terminal: types, and waits for what should appear."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # our own terminal
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        if text == CTRL_C:
            time.sleep(0.3)  # readline shows its prompt a moment before it listens for signals
        os.write(self.terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What came up to and with ``text``, which is then taken as read."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come; this did: {self.seen!r}"
            if select.select([self.terminal], [], [], left)[0]:
                try:
                    piece = os.read(self.terminal, 65536)
                except OSError:  # Linux's way to say that the other side is closed
                    piece = b""
                assert piece, f"it ended before {text!r} came: {self.seen!r}"
                self.seen += piece.decode("utf-8", "replace").replace("\r", "")
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def ended(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def leave(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


SLOWLY = """
import sys, time
from edgellm.cli import main
from edgellm.runtimes.fake import FakeSession
compute = FakeSession._compute
FakeSession._compute = lambda *args: time.sleep(0.05) or compute(*args)
sys.exit(main(sys.argv[1:]))
"""
"""The command line with a fake runtime that takes 50 ms for a token."""


BEFORE_ANSWERS = """
from edgellm.cli import render
render.show_stream = lambda pieces: print("thinking") or time.sleep(60)
"""
"""To be put into it: answers that have not begun after a minute."""


@pytest.fixture
def open_chat(onnx_artifact: Path, tmp_path: Path) -> Iterator[Callable[[str], Typist]]:
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TERM": "dumb",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with ExitStack() as typists:

        def open_by(program: str) -> Typist:
            command = [sys.executable, "-c", program, "run", str(onnx_artifact)]
            command += ["--runtime", "fake", "--context", "200"]
            typist = Typist(command, environment)
            typists.callback(typist.leave)
            typist.wait_for(">>> ")
            return typist

        yield open_by


@pytest.fixture
def chat(open_chat: Callable[[str], Typist]) -> Typist:
    return open_chat(SLOWLY)


def test_a_conversation(chat: Typist, tmp_path: Path) -> None:
    chat.type("/help\n")
    assert "/save FILE" in chat.wait_for("the conversation goes on")
    chat.wait_for(">>> ")
    chat.type("/stats\n")
    chat.wait_for("nothing was answered yet")
    chat.type("/exot\n")
    chat.wait_for("no command /exot")
    chat.type('"""two\nlines"""\n')
    chat.wait_for("... ")
    chat.wait_for(">>> ")
    chat.type("/stats\n")
    assert "tokens/s" in chat.wait_for("of 200 tokens")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("2 messages written")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"] == "two\nlines"
    chat.type(f"/save {tmp_path / 'no' / 'talk.json'}\n")
    chat.wait_for("cannot write")
    chat.type("/clear\n")
    chat.wait_for("the conversation is forgotten")
    chat.type(f"/save {tmp_path / 'empty.json'}\n")
    chat.wait_for("0 messages written")
    chat.type("/exit\n")
    assert chat.ended() == 0


def test_lines_pasted_together_are_one_message(chat: Typist, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    chat.type("\x1b[200~two\nlines\x1b[201~\n")
    chat.wait_for("lines")
    chat.wait_for(">>> ")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("2 messages written")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0]["content"] == "two\nlines"
    chat.type("/exit\n")
    assert chat.ended() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat: Typist, tmp_path: Path) -> None:
    chat.type("tell me everything\n")
    chat.wait_for("everything\n")
    time.sleep(0.5)
    chat.type(CTRL_C)
    chat.wait_for("(stopped)", seconds=5)
    chat.wait_for(">>> ")
    chat.type("/stats\n")
    tokens = int(chat.wait_for(" new tokens").split()[-3])
    assert 0 < tokens < 100
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("2 messages written")
    chat.type("and now?\n")
    chat.wait_for("and now?\n")
    time.sleep(0.3)
    chat.type(CTRL_C)
    chat.wait_for("(stopped)", seconds=5)
    chat.type("/exit\n")
    assert chat.ended() == 0


def test_ctrl_c_before_an_answer_begins_does_not_end_the_chat(
    open_chat: Callable[[str], Typist],
) -> None:
    slow = SLOWLY.replace("compute =", f"{BEFORE_ANSWERS}compute =", 1)
    chat = open_chat(slow)
    chat.type("tell me everything\n")
    chat.wait_for("thinking")
    chat.type(CTRL_C)
    chat.wait_for("(stopped)", seconds=5)
    chat.wait_for(">>> ")
    chat.type("/exit\n")
    assert chat.ended() == 0


def test_a_full_context_ends_the_answer_and_not_the_chat(chat: Typist) -> None:
    chat.type("x" * 180 + "\n")
    shown = chat.wait_for(">>> ")
    chat.type("y" * 180 + "\n")
    shown += chat.wait_for(">>> ")
    assert "error:" in shown
    assert "/clear" in shown
    chat.type(CTRL_D)
    assert chat.ended() == 0


def test_ctrl_c_at_the_prompt_leaves_at_the_second_time(chat: Typist) -> None:
    chat.type(CTRL_C)
    chat.wait_for("Ctrl-C again")
    chat.wait_for(">>> ")
    assert chat.process.poll() is None
    chat.type(CTRL_C)
    assert chat.ended() == 0
