"""The other end of ``worker.py``: a cell's process, asked with a time limit and outlived."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, TypeVar

import msgspec

from edgellm.errors import GenerationError
from edgellm.profiling.worker import Job, Ready, Round

COMMAND = (sys.executable, "-m", "edgellm.profiling.worker")

LAST_WORDS_BYTES = 2000

Answer = TypeVar("Answer", Ready, Round)


class CellFailed(GenerationError):
    """Why a cell has no more figures, in words."""


class CellProcess:
    """One cell's process. Its methods raise ``CellFailed``; it has ended then."""

    def __init__(self, job: Job, timeout_s: float) -> None:
        """Start it and wait until the artifact is loaded."""
        self._timeout_s = timeout_s
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._lines: queue.Queue[bytes] = queue.Queue()
        # Reading with a time limit needs a thread where pipes cannot be polled (Windows).
        reader = threading.Thread(
            target=_read, args=(self._process.stdout, self._lines), daemon=True
        )
        reader.start()
        self.ready = self._ask(msgspec.json.encode(job), Ready)

    def round(self) -> Round:
        """The figures of one round."""
        return self._ask(b"round", Round)

    def close(self) -> None:
        """End it and give its memory back; harmless where it has ended."""
        try:
            self._requests.close()
        except OSError:  # it has ended before it read what was sent
            pass
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def kill(self) -> None:
        """End it at once, in the middle of a round."""
        self._process.kill()
        self.close()

    def _ask(self, request: bytes, kind: type[Answer]) -> Answer:
        try:
            self._requests.write(request + b"\n")
            self._requests.flush()
        except OSError:
            raise self._failed(self._end()) from None
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            self._process.kill()
            self._end()
            raise self._failed(
                f"no answer within {self._timeout_s:g} s: give it longer with --timeout, or ask "
                "for less"
            ) from None
        if not line:
            raise self._failed(self._end())
        answer = msgspec.json.decode(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return msgspec.convert(answer, kind)

    def _end(self) -> str:
        """How a process that says no more ended, with its last words."""
        code = self._process.wait()
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - LAST_WORDS_BYTES))
        words = self._said.read().decode(errors="replace").strip().splitlines()
        return f"{_how(code)}{f': {words[-1]}' if words else ''}"

    def _failed(self, reason: str) -> CellFailed:
        self.close()
        return CellFailed(reason)


def _read(stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")
    stream.close()


def _how(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "it was killed, as Linux does where memory runs out"
    if code < 0:
        return f"it crashed ({signal.Signals(-code).name})"
    return f"it ended early, with {code}"
