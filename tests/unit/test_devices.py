"""Devices that solve: chosen by name, refused with a reason, one worker at a time on each."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading

import pytest

from edgellm.errors import GenerationError, RuntimeMissing, UsageError
from edgellm.quant import devices

SOLVES = """
import sys
import numpy as np
from edgellm.quant import devices, gptq
from edgellm.quant.grid import GRIDS
from edgellm.quant.statistics import Statistics
assert devices.choose(None).name == devices.choose("cpu").name == "cpu"
rows = np.ones((2, 32), np.float32)
gptq.solve(rows, GRIDS["q4_0"], Statistics(np.eye(32, dtype=np.float32), rows[0], 1))
sys.exit("torch" in sys.modules)
"""


def test_solving_on_the_cpu_does_not_import_torch() -> None:
    assert subprocess.run([sys.executable, "-c", SOLVES]).returncode == 0


def test_a_name_that_is_no_device_is_refused() -> None:
    with pytest.raises(UsageError, match="'tpu' to solve on: choose auto, cpu, cuda, metal"):
        devices.choose("tpu")


def test_without_torch_a_gpu_is_refused_and_auto_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeMissing, match=r"--device metal .* pip install 'edgellm\[calib"):
        devices.choose("metal")
    assert devices.choose("auto") == devices.Choice(
        "cpu", "torch, which solves on GPUs, is not installed"
    )


def test_workers_take_turns_on_a_device_alone() -> None:
    inside: list[str] = []
    entered = threading.Event()

    def take_turn() -> None:
        with devices.turn("cuda"):
            inside.append("second")
            entered.set()

    with devices.turn("cuda"):
        worker = threading.Thread(target=take_turn)
        worker.start()
        with devices.turn(None):  # numpy's waits for nobody
            assert not entered.wait(0.1)
        inside.append("first")
    worker.join()
    assert inside == ["first", "second"]


def test_the_device_is_free_again_after_a_failure() -> None:
    for _ in range(2):
        with (
            pytest.raises(GenerationError, match=r"on mps: out of memory\. Leave --device out"),
            devices.turn("mps"),
        ):
            raise RuntimeError("out of memory")
