"""What tuning is told, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from edgellm.errors import UsageError

Window = TypeVar("Window")

HELD_OUT = 8
"""One window in so many is never trained on: by it is decided what is kept."""

MOST_HELD_OUT = 8
"""Windows that are held out at the most; the error of their mean is small by then."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. ``steps`` end to end, ``block_steps`` for each decoder block before.

    A step sees about ``step_tokens`` tokens. Rates are those of Adam at the peak, for numbers that
    move in proportion to their size; they rise over ``warm_up`` steps and fall to zero by a cosine:
    at the full rate the answers are worse than at the start, and only the fall brings the gain.
    """

    steps: int
    block_steps: int = 0
    step_tokens: int = 512
    rate: float = 1e-3
    norm_rate: float = 1e-3
    block_rate: float = 1e-3
    warm_up: int = 5
    seed: int = 0


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What was done and what it gained; divergences are means in nats over the held-out tokens.

    ``kl_before`` is None where the network was not trained end to end. ``kept_step``: the step
    whose numbers were kept, 0 for none. ``blocks``: how many blocks of all were kept trained.
    """

    settings: Settings
    training_tokens: int
    held_out_tokens: int
    threads: int
    torch: str
    kl_before: float | None = None
    kl_after: float | None = None
    kept_step: int = 0
    blocks: int = 0
    note: str = ""


Tell = Callable[[str, int, int], None]
"""Called with what happens, and the work done and to be done in steps."""


def split(windows: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    """Windows to train on, and those held out: spread over all, so that each kind of text is there.

    Raises ``UsageError`` where there are fewer than two.
    """
    if len(windows) < 2:
        raise UsageError(
            f"--tune needs at least 2 windows of calibration text, one of them to judge by, and "
            f"there is {len(windows)}: name a longer text (--calibration), or more of it "
            "(--calibration-tokens)"
        )
    every = max(min(HELD_OUT, len(windows)), len(windows) // MOST_HELD_OUT)
    chosen = set(range(every - 1, len(windows), every)[:MOST_HELD_OUT])
    training = [window for index, window in enumerate(windows) if index not in chosen]
    return training, [windows[index] for index in sorted(chosen)]


def rate_share(step: int, steps: int, warm_up: int) -> float:
    """Share of the peak rate at ``step`` (from 0) of ``steps``: a rise, then a cosine to zero."""
    import math

    rise = min(warm_up, max(1, steps // 4))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / max(1, steps - rise)))
