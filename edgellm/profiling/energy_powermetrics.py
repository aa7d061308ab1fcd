"""The energy of Apple Silicon, by adding up what macOS's ``powermetrics`` samples.

It prints the mean power of each interval (``man powermetrics``), and runs for root alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterable, Sequence
from typing import IO

from edgellm.errors import GenerationError
from edgellm.profiling.system_files import SystemFiles

INTERVAL_MS = 200
COMMAND = (
    "/usr/bin/powermetrics", "--samplers", "cpu_power", "--sample-rate", str(INTERVAL_MS),
    "--buffer-size", "1",
)  # fmt: skip

ELAPSED = re.compile(r"\*\*\* Sampled system activity .*\(([\d.]+)ms elapsed\)")
POWER = re.compile(r"Combined Power \(.*\): ([\d.]+) mW")


class PowermetricsCounter:
    """Energy since the first reading, which starts the program; late by up to one interval.

    Not tried on a Mac yet.
    """

    name = "powermetrics"
    step_j: float | None = None

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._total_j = 0.0

    def read_j(self) -> float:
        if self._process is None:
            self._process = self._start()
        elif self._process.poll() is not None:
            raise GenerationError(
                f"powermetrics ended by itself (code {self._process.returncode}): measure again"
            )
        return self._total_j

    def close(self) -> None:
        """End the program; it also ends with its pipe, when this process does."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise GenerationError(
                f"powermetrics cannot be started ({error.strerror}): measure without energy"
            ) from error
        assert process.stdout is not None
        threading.Thread(target=self._add_up, args=(process.stdout,), daemon=True).start()
        return process

    def _add_up(self, lines: IO[str]) -> None:
        with lines:
            elapsed_s = 0.0
            for line in lines:
                if found := ELAPSED.match(line):
                    elapsed_s = float(found[1]) / 1e3
                elif found := POWER.match(line):
                    self._total_j += float(found[1]) / 1e3 * elapsed_s


def powermetrics_counter(files: SystemFiles) -> Iterable[PowermetricsCounter | str]:
    """The counter on a Mac, or what it would take."""
    if files.system != "Darwin":
        return
    if os.geteuid() == 0:
        yield PowermetricsCounter()
    else:
        yield f"powermetrics: {COMMAND[0]} runs for root alone: measure with sudo"
