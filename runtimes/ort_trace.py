"""onnxruntime's own profile of a session, read back as steps and operators.

On a CPU an operator returns when it is done. What computes beside the CPU (CUDA, DirectML) is only
handed over there, so that its times would mean nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.runtimes.operators import OperatorEvent, TracedStep, layer_of_node

CLOCK = "onnxruntime's profiler"

NODE_SUFFIX = "_kernel_time"
"""What the name of a node's event ends in; older releases have events for its fences as well."""

TICK_S = 1e-6
"""The profiler counts whole microseconds."""


class OrtTrace:
    """The folder that onnxruntime writes a profile into, and how many tokens each run was given."""

    def __init__(self, device: str, devices: Sequence[str]) -> None:
        """Raises ``UnsupportedTarget`` for a device other than ``devices``, which wait."""
        if device not in devices:
            raise UnsupportedTarget(
                f"onnxruntime sees when it hands an operator to {device}, not how long that takes "
                "there: choose --device cpu, or leave the operators out"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="edgellm-trace-"))
        self._delete = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._tokens: list[int] = []

    @property
    def prefix(self) -> str:
        """What the profile's path is to begin with."""
        return str(self._folder / "profile")

    def ran(self, tokens: int) -> None:
        """Note that the graph was run with so many tokens."""
        self._tokens.append(tokens)

    def steps(self) -> list[TracedStep]:
        """What was computed; the profile must be complete, and is deleted.

        Raises ``GenerationError`` where it is not, or where it holds other runs than were noted.
        """
        try:
            files = self._folder.iterdir()
            found = [step for file in files for step in read_profile(file.read_bytes())]
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise GenerationError(
                f"onnxruntime's profile cannot be understood ({error!r}): leave the operators out"
            ) from error
        finally:
            self.discard()
        if len(found) != len(self._tokens):
            raise GenerationError(
                f"onnxruntime's profile has {len(found)} runs of the graph, and there were "
                f"{len(self._tokens)}: trace fewer tokens, or leave the operators out"
            )
        return [
            TracedStep(tokens, step.start_s, step.seconds, step.events)
            for tokens, step in zip(self._tokens, found, strict=True)
        ]

    def discard(self) -> None:
        """Delete what was written."""
        self._delete()


def read_profile(content: bytes) -> list[TracedStep]:
    """The runs in a profile, oldest first, with 0 for their tokens, of which it does not tell."""
    events = msgspec.json.decode(content)
    runs = _in_order([event for event in events if event["name"] == "model_run"])
    nodes = _in_order([event for event in events if event["name"].endswith(NODE_SUFFIX)])
    starts = [run["ts"] for run in runs]
    inside: list[list[OperatorEvent]] = [[] for _ in runs]
    # Of every run, how long it is certain to have lasted. Beginnings and lengths are cut down to
    # whole microseconds, each for itself, so that an operator may seem to end after its run.
    ends = [run["ts"] + run["dur"] for run in runs]
    busy_until = 0
    for node in nodes:
        place = bisect_right(starts, node["ts"]) - 1
        # A branch or loop is one operator; those of its own graph lie within its time.
        if place >= 0 and node["ts"] >= busy_until:
            busy_until = node["ts"] + node["dur"]
            ends[place] = max(ends[place], busy_until)
            inside[place].append(_operator(node))
    return [
        TracedStep(0, start * TICK_S, (end - start) * TICK_S, tuple(events))
        for start, end, events in zip(starts, ends, inside, strict=True)
    ]


def _in_order(events: list[Any]) -> list[Any]:
    """By their start, and what encloses others before them."""
    return sorted(events, key=lambda event: (event["ts"], -event["dur"]))


def _operator(node: Any) -> OperatorEvent:
    name = node["name"].removesuffix(NODE_SUFFIX)
    return OperatorEvent(
        name,
        node["args"]["op_name"],
        layer_of_node(name),
        node["ts"] * TICK_S,
        node["dur"] * TICK_S,
    )
