"""How long-running work tells whoever watches; the library itself never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal[
    "download",
    "quantize",
    "merge",
    "checksum",
    "check",
    "reference",
    "evaluate",
    "tune",
    "calibrate",
    "gradients",
]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step forward: bytes of output (or of the download) and whole tensors done so far.

    ``seconds_left``: where whoever works knows better than what is done and the clock say.
    """

    stage: Stage
    item: str
    done_bytes: int
    total_bytes: int
    done_items: int = 0
    total_items: int = 0
    seconds_left: float | None = None


Progress = Callable[[ProgressEvent], None]


def unwatched(event: ProgressEvent) -> None:
    """The progress of work that nobody watches."""
