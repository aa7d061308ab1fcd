"""One decoder block after another, each trained to give what the source's gives.

A block of the artifact sees what the blocks before it, already trained, make of the text; what it
should give is what the source's block gives in the source. Only one block of each is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm.architectures.decoder import Decoder
from edgellm.tune import torch_decoder
from edgellm.tune.products import quick_products
from edgellm.tune.settings import Settings, rate_share
from edgellm.tune.weights import StudentWeights, parameter_groups
from edgellm.tune.whole import BETAS, batches_by_step


@dataclass(frozen=True)
class BlockExample:
    """What goes into a block of the artifact and what should come out ``[batch, tokens, hidden]``.

    Each token counts by its error in proportion to its size: the first token of a text may be
    hundreds of times larger than all others.
    """

    given: Tensor
    wanted: Tensor

    def loss(self, found: Tensor) -> Tensor:
        """The mean over tokens of the squared error by the squared size of what is wanted."""
        error = (found - self.wanted).square().sum(dim=-1)
        size = self.wanted.square().sum(dim=-1)
        return (error / size.clamp_min(1e-12)).mean()


def train_block(
    decoder: Decoder,
    index: int,
    weights: StudentWeights,
    training: Sequence[BlockExample],
    held_out: Sequence[BlockExample],
    settings: Settings,
) -> tuple[float, float]:
    """Train block ``index`` in place; the held-out error before and after.

    Where it did not fall, the weights are what they were before.
    """

    def held_out_error() -> float:
        with torch.no_grad():
            losses = [
                float(example.loss(torch_decoder.layer(decoder, index, weights, example.given)))
                for example in held_out
            ]
        return sum(losses) / len(losses)

    steps = settings.block_steps
    optimizer = torch.optim.Adam(parameter_groups(weights, settings), betas=BETAS)
    before, kept = held_out_error(), weights.snapshot()
    sizes = [example.given.shape[0] * example.given.shape[1] for example in training]
    order = batches_by_step(sizes, steps, settings.step_tokens, settings.seed + index)
    for step, places in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = settings.block_rate * rate_share(step, steps, settings.warm_up)
        tokens = sum(sizes[place] for place in places)
        with quick_products(weights, settings.products):
            for place in places:
                example = training[place]
                found = torch_decoder.layer(decoder, index, weights, example.given)
                loss = example.loss(found) * sizes[place] / tokens
                loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = held_out_error()
    if after < before:
        return before, after
    weights.restore(kept)
    return before, before
