"""What tuning is told, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edgellm.calibration.texts import WINDOW_TOKENS
from edgellm.errors import UsageError
from edgellm.manifest import TuningEntry

if TYPE_CHECKING:
    from edgellm.calibration.texts import CalibrationText

Window = TypeVar("Window")

HELD_OUT = 8
"""One window in so many is never trained on: by it is decided what is kept."""

MOST_HELD_OUT = 8
"""Windows that are held out at the most: what is compared are answers to the same tokens, so few
are enough."""

STEP_TOKENS = 2048
"""Tokens that a step sees, in one batch after another."""

BATCH_TOKENS = 1024
"""Tokens of a batch, in one window or several: what is computed of them is in memory at once."""

MOST_TOKENS = 131072
"""Of text to train on: what the source answers to each stays in memory."""

GRADIENT_TOKENS = 16384
"""Whose gradients say how rows go together: SmolLM2's q4_k_m gained nothing by those of 60,000."""

POSITIONS = 256
"""Positions whose logits are alive at once: enough for products to run at full speed."""

RATE, NORM_RATE, BLOCK_RATE = 7e-4, 1e-3, 1e-3
"""Rates of Adam at their peak: of scales and minima, of norms and biases, and of both where blocks
are trained one by one; of codes of ``RATE_BITS`` bits."""

RATE_BITS = 4

FIXED_GRIDS = ("nf4-dq",)
"""Grids whose scales are rounded together, so that none of them can move alone."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. ``steps`` end to end, ``block_steps`` for each decoder block before.

    ``gradient_tokens``: of how many tokens the source's gradients are taken for codes to be solved
    by, 0 where rows are solved apart.

    A step sees at least ``step_tokens`` tokens; gradients are multiplied in the type ``products``.
    Rates are those of Adam at the peak, for numbers that move in proportion to their size; they
    rise over ``warm_up`` steps and fall to zero by a cosine: at the full rate the answers are worse
    than at the start, and only the fall brings the gain.

    What limits the gain is the noise of the gradients, so more tokens are what helps. KL on 8
    held-out windows of SmolLM2 in ``gptq:q4_0``, calibrated and tuned on text of their kind, by
    that of no tuning: 83,000 tokens seen once in 41 steps 0.90, and 0.89 with three quarters of the
    change; seen three times 0.86 and 0.85. As many steps with two thirds of the text of a
    neighbouring kind, all seen once: 0.87. What gained nothing over one share for all: shares by
    tensor, row or scale from how steady its gradients were, and more or less of the change of
    norms, of the embedding, of the first or the last layers. A quadratic loss (Fisher's mean matrix
    on the last hidden state) lost: 0.90 where the divergence gave 0.89. In steps of 512 tokens: no
    gain by other powers of the gradients' mean squares, curvatures by row, and factors by row and
    column in the stead of scales.
    """

    steps: int
    block_steps: int = 0
    gradient_tokens: int = 0
    step_tokens: int = STEP_TOKENS
    products: str = "float32"
    rate: float = RATE
    norm_rate: float = NORM_RATE
    block_rate: float = BLOCK_RATE
    warm_up: int = 5
    seed: int = 0


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What was done and what it gained; divergences are means in nats over the held-out tokens.

    ``kl_before``, ``kl_blocks`` (after the blocks) and ``kl_after`` are None where the network was
    not in memory whole. ``blocks``: how many blocks were kept trained. ``kept_share``: the share
    of the change found end to end that was kept, 0 for none.
    """

    settings: Settings
    training_tokens: int
    held_out_tokens: int
    threads: int
    torch: str
    kl_before: float | None = None
    kl_blocks: float | None = None
    kl_after: float | None = None
    kept_share: float = 0.0
    blocks: int = 0

    def figures(self) -> dict[str, Any]:
        """What was measured, for the manifest."""
        names = ("kl_before", "kl_blocks", "kl_after", "kept_share", "blocks")
        return {name: getattr(self, name) for name in names}

    def entry(self, text: CalibrationText) -> TuningEntry:
        """What was done, on ``text``, for the manifest's digested part."""
        return TuningEntry(
            settings=msgspec.to_builtins(self.settings),
            text=text.name,
            text_sha256=text.text_sha256,
            ids_sha256=text.sha256,
            training_tokens=self.training_tokens,
            held_out_tokens=self.held_out_tokens,
            threads=self.threads,
            torch=self.torch,
        )


Tell = Callable[[str, int, float], None]
"""Called with what happens, the steps done, and the seconds left."""


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


def tokens_for(steps: int) -> int:
    """The tokens of text that so many steps train on once, and those that are held out."""
    return min(steps * STEP_TOKENS + MOST_HELD_OUT * WINDOW_TOKENS, MOST_TOKENS)


def rate_share(step: int, steps: int, warm_up: int) -> float:
    """Share of the peak rate at ``step`` (from 0) of ``steps``: a rise, then a cosine to zero."""
    rise = min(warm_up, max(1, steps // 4))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / max(1, steps - rise)))
