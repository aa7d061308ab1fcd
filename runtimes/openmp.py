"""How OpenMP's threads wait for each other, in the libraries that we load."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from edgellm.hardware import machine_is_busy

OPENMP_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
QUIET_SPIN_COUNT, BUSY_SPIN_COUNT = "30000", "2000"
"""Turns of a waiting loop, 10 to 45 ns each by CPU. SmolLM2 Q4_0 on two cores took, in ms a token:
on a nearly idle machine 10 at 30000 turns and 17 without spinning; on one shared with busy others
255 by libgomp's default, 70 at 3000, 45 at 1000, 33 without spinning."""


_changing = threading.RLock()


@contextlib.contextmanager
def short_spin() -> Iterator[None]:
    """Let OpenMP's threads give up spinning early, unless the environment says how they wait.

    libgomp reads this once, when it is loaded. By default its threads spin for milliseconds at the
    end of every operation, which on a busy machine keeps the very thread from running that they
    wait for: a token then takes ten times as long. On a quiet one a longer wait is quicker.
    """
    with _changing:
        if OPENMP_WAITING & os.environ.keys():
            yield
            return
        os.environ["GOMP_SPINCOUNT"] = BUSY_SPIN_COUNT if machine_is_busy() else QUIET_SPIN_COUNT
        try:
            yield
        finally:
            del os.environ["GOMP_SPINCOUNT"]
