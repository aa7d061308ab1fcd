"""The other end of ``worker.py``: a cell's process, asked with a time limit and outlived."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, TypeVar

import msgspec

from edgellm.errors import GenerationError
from edgellm.profiling.document import Operators
from edgellm.profiling.exchange import Job, Ready, Round

COMMAND = (sys.executable, "-P", "-m", "edgellm.profiling.worker")
"""``-P``: modules are looked for where this process does, not in the folder that it is in."""

LAST_WORDS_BYTES = 2000

ENDING_S = 5.0
"""How long a process may take to end by itself."""

LISTENING_S = 0.5
"""How often a wait for an answer is left for a moment: Windows hears Ctrl-C only in between."""

Answer = TypeVar("Answer", Ready, Round, Operators)


class CellFailed(GenerationError):
    """Why a cell has no more figures, in words."""


class CellProcess:
    """One cell's process. Its methods raise ``CellFailed``; it has ended then."""

    def __init__(self, job: Job, timeout_s: float) -> None:
        """Start it and wait until the artifact is loaded."""
        self._worker = _Worker(timeout_s)
        try:
            self.ready = self._worker.ask(msgspec.json.encode(job), Ready)
        except BaseException:  # Ctrl-C: nobody else knows of it yet
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Its number in the system."""
        return self._worker.process.pid

    def round(self) -> Round:
        """The figures of one round."""
        return self._worker.ask(b"round", Round)

    def close(self) -> None:
        """End it and give its memory back; harmless where it has ended."""
        self._worker.close()

    def kill(self) -> None:
        """End it at once, in the middle of a round; harmless where it has ended."""
        self._worker.kill()


def operators_of(job: Job, timeout_s: float) -> Operators:
    """Where a token's time goes, measured in a process of its own; says why where it cannot."""
    worker = _Worker(timeout_s)
    try:
        found = worker.ask(msgspec.json.encode(job), Operators)
    except CellFailed as failure:
        return Operators(reason=str(failure))
    except BaseException:  # Ctrl-C
        worker.kill()
        raise
    worker.close()
    return found


class _Worker:
    """A process that answers each line with one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process lives
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests: IO[bytes] = self.process.stdin
        self._lines: queue.Queue[bytes] = queue.Queue()
        # Reading with a time limit needs a thread where pipes cannot be polled (Windows).
        reading = (self.process.stdout, self._lines)
        self._reader = threading.Thread(target=_read, args=reading, daemon=True)
        self._reader.start()

    def ask(self, request: bytes, kind: type[Answer]) -> Answer:
        """What it answers; raises ``CellFailed``, and then it has ended."""
        try:
            self._requests.write(request + b"\n")
            self._requests.flush()
        except OSError:
            raise self._failed(self._end()) from None
        line = self._line()
        if line is None:
            self.process.kill()
            raise self._failed(
                f"no answer within {self._timeout_s:g} s: give it longer with --timeout, or ask "
                "for less"
            )
        if not line:
            raise self._failed(self._end())
        try:
            answer = msgspec.json.decode(line)
            if "error" in answer:
                raise self._failed(answer["error"])
            return msgspec.convert(answer, kind)
        except msgspec.MsgspecError:
            said = line.decode(errors="replace").strip()
            raise self._failed(f"it said what cannot be understood: {said[:80]}") from None

    def _line(self) -> bytes | None:
        """Its next line, empty where it says no more; None when the time is over."""
        end = time.monotonic() + self._timeout_s
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=min(left, LISTENING_S))
        return None

    def kill(self) -> None:
        """End it at once; harmless where it has ended."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it; harmless where it has ended."""
        with contextlib.suppress(OSError):  # it has ended before it read what was sent
            self._requests.close()
        try:
            self.process.wait(timeout=ENDING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self._said.close()

    def _end(self) -> str:
        """How a process that says no more ended, with its last words."""
        try:
            how = _how(self.process.wait(timeout=ENDING_S))
        except subprocess.TimeoutExpired:
            self.process.kill()
            how = "it said no more, and did not end"
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - LAST_WORDS_BYTES))
        words = self._said.read().decode(errors="replace").strip().splitlines()
        return f"{how}{f': {words[-1]}' if words else ''}"

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
        names = {each.value: each.name for each in signal.Signals}
        return f"it crashed ({names.get(-code, f'signal {-code}')})"
    return f"it ended early, with {code}"
