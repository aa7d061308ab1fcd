"""Keeps one core busy half of the time, in spells of 0.1 to 2 s, until it is killed."""

from __future__ import annotations

import random
import time

chance = random.Random(1)
while True:
    end = time.perf_counter() + chance.uniform(0.1, 2.0)
    while time.perf_counter() < end:
        pass
    time.sleep(chance.uniform(0.1, 2.0))
