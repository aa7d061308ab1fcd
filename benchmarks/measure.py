"""Run commands in processes of their own and read wall time and true peak memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.places import WORK, environment, shown

PAUSE_S = 0.2
"""Rest between measurements, so that spinning threads of the last one have gone to sleep."""

SETTLING_S, QUIET_PERCENT = 60.0, 1.0
"""How long to wait for a quiet machine, and which share of waiting for a CPU is quiet."""

MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class CommandFailed(Exception):
    """A measured command ended with an error; the message holds the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one command took. ``first_output_s``: until its first byte on stdout, if that was read.

    ``cpu_s``: of all its threads, in the kernel too.

    ``peak_memory_bytes`` is the highest resident set of any one process of it, mapped file pages
    counted.
    """

    wall_s: float
    peak_memory_bytes: int
    cpu_s: float
    first_output_s: float | None = None


def run(command: Sequence[str], *, read_stdout: bool = False, **variables: str) -> Run:
    """Run ``command`` in the work folder, after dirty pages have gone to the disk.

    Peak memory comes from ``wait4``, so it includes what no sampling sees. The kernel starts a
    child's high-water mark at the parent's, which is why this process stays small.
    Raises ``CommandFailed``.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "last-command.log"
    os.sync()
    time.sleep(PAUSE_S)
    first_output_s = None
    with log.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            cwd=WORK,
            env=environment(command) | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if read_stdout else file,
            stderr=file,
        )
        if process.stdout is not None:
            beginning = process.stdout.read(1)
            first_output_s = time.perf_counter() - started
            file.write(beginning + process.stdout.read())
            process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        end = log.read_text(errors="replace")[-3000:]
        raise CommandFailed(f"{shown(list(command))} ended with {process.returncode}:\n{end}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, usage.ru_maxrss * MAXRSS_UNIT_BYTES, cpu_s, first_output_s)


def output_of(command: Sequence[str]) -> Any:
    """The JSON document that ``command`` prints; raises ``CommandFailed``. Not for timing."""
    done = subprocess.run(
        list(command),
        cwd=WORK,
        env=environment(command),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        end = (done.stdout + done.stderr)[-3000:]
        raise CommandFailed(f"{shown(list(command))} ended with {done.returncode}:\n{end}")
    return json.loads(done.stdout)


def fresh(*names: str) -> None:
    """Remove files and folders of the work folder that a command is about to write.

    And what a killed run left of them: one that goes on there takes less time.
    """
    for name in names:
        for left in WORK.glob(f".{name}.*.partial"):
            shutil.rmtree(left)
        path = WORK / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def folder_bytes(path: Path) -> int:
    """Size of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], *, pairs: int, warm_up: int
) -> tuple[list[Any], list[Any]]:
    """Results of ``first`` and ``second``, called in turn; those of the warm-up are dropped."""
    of_first, of_second = [], []
    for pair in range(-warm_up, pairs):
        a, b = first(), second()
        if pair >= 0:
            of_first.append(a)
            of_second.append(b)
    return of_first, of_second


def settle() -> None:
    """Wait, a minute at most, until nothing has waited for a CPU lately, where Linux tells.

    Our runtimes choose by that, when they are loaded, how their threads wait for each other; a
    conversion that has just ended is not what they should go by.
    """
    pressure = Path("/proc/pressure/cpu")
    end = time.perf_counter() + SETTLING_S
    while pressure.exists() and time.perf_counter() < end:
        found = re.search(r"some avg10=([\d.]+)", pressure.read_text())
        if found is None or float(found[1]) < QUIET_PERCENT:
            return
        time.sleep(1.0)


class Loop:
    """A program that stays loaded and measures one round each time it is asked.

    It prints a JSON line when it is ready, then one for every line that it reads.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.log = WORK / "last-loop.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=WORK,
                env=environment(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._answer()

    def round(self) -> dict[str, Any]:
        """The measurements of one round."""
        time.sleep(PAUSE_S)
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            end = self.log.read_text(errors="replace")[-3000:]
            raise CommandFailed(f"{shown(self.command)} ended early:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
