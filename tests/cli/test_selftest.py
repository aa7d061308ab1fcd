"""``edgellm selftest`` as a person sees it: the table, the exit code, JSON."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def test_a_runtime_that_keeps_its_promises(command: Command) -> None:
    done = command("selftest", "--runtime", "onnxruntime")
    assert done.code == 0, done.err
    assert "9 of 9 passed" in done.out
    assert "FAIL" not in done.out
    for private in (socket.gethostname(), str(Path.home())):
        assert private not in done.out


def test_a_failure_has_an_exit_code_and_the_table_all_the_same(command: Command) -> None:
    done = command("selftest", "--runtime", "fake")
    assert done.code == 8
    assert "8 of 9 passed" in done.out
    assert "the float network's logits  FAIL" in done.out
    assert "1 check of 9 failed" in done.err


def test_json(command: Command) -> None:
    found = command("selftest", "--runtime", "onnxruntime", "--device", "cpu", "--json").json()
    assert {each["device"] for each in found["outcomes"]} == {"cpu"}
    assert all(each["passed"] for each in found["outcomes"])
    assert found["versions"].keys() == {"onnxruntime"}


@pytest.mark.parametrize("options", [("--device", "gpu"), ("--runtime", "abacus")])
def test_what_cannot_be_tried(options: tuple[str, ...], command: Command) -> None:
    done = command("selftest", *options)
    assert done.code in (2, 5)
    assert options[1] in done.err
