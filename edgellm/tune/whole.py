"""The network trained end to end: KL divergence of its answers to the source's, on every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgellm.architectures.decoder import Decoder
from edgellm.tune import torch_decoder
from edgellm.tune.divergence import head_divergence
from edgellm.tune.settings import Settings, Tell, rate_share
from edgellm.tune.weights import StudentWeights, parameter_groups

CHECKS = (0.6, 0.8, 1.0)
"""Shares of the steps after which the held-out text is looked at: while the rate is high, what is
trained is worse than what was, so nothing of the first half is kept."""

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Example:
    """Windows of one length: token ids ``[batch, tokens]``, and what the source's head was given.

    ``wanted`` float32 ``[batch, tokens, hidden]``, normed.
    """

    ids: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Outcome:
    """The mean divergence in nats on the held-out text, and the step that was kept (0: none)."""

    after: float
    kept_step: int


@dataclass(frozen=True)
class Network:
    """A student whole: its weights, and the head that the source answers with ``[vocab, hidden]``.

    ``recompute``: forget what layers computed and compute it again on the way back, for memory.
    """

    decoder: Decoder
    weights: StudentWeights
    teacher_head: Tensor
    recompute: bool = False

    def divergence(self, example: Example) -> Tensor:
        """The sum over the positions of ``example`` of KL(source || student) in nats."""
        decoder, weights = self.decoder, self.weights
        stream = torch_decoder.embedded(decoder, weights, example.ids)
        for index in range(len(decoder.layers)):
            if self.recompute and torch.is_grad_enabled():
                stream = checkpoint(
                    torch_decoder.layer, decoder, index, weights, stream, use_reentrant=False
                )
            else:
                stream = torch_decoder.layer(decoder, index, weights, stream)
        normed = torch_decoder.head_input(decoder, weights, stream)
        return head_divergence(
            normed,
            weights.head(),
            example.wanted,
            self.teacher_head,
            bias=weights.vector("output.bias"),
            cap=decoder.logit_softcap,
        )

    def mean_divergence(self, examples: Sequence[Example]) -> float:
        """By token, over all ``examples``."""
        with torch.no_grad():
            total = sum(float(self.divergence(example)) for example in examples)
        return total / sum(example.ids.numel() for example in examples)


def train_whole(
    network: Network,
    training: Sequence[Example],
    held_out: Sequence[Example],
    before: float,
    settings: Settings,
    tell: Tell,
) -> Outcome:
    """Train the weights of ``network`` in place; at the end they are the best that were found.

    Judged by the held-out examples, whose divergence is ``before`` now; where nothing was better,
    the weights are what they were.
    """
    steps = settings.steps
    optimizer = torch.optim.Adam(parameter_groups(network.weights, settings), betas=BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = example_order(len(training), steps, settings.seed)
    checks = {round(share * steps) for share in CHECKS}
    best, kept, kept_step = before, network.weights.snapshot(), 0
    started = time.perf_counter()
    for step, place in enumerate(order):
        share = rate_share(step, steps, settings.warm_up)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        example = training[place]
        loss = network.divergence(example) / example.ids.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in checks:
            found = network.mean_divergence(held_out)
            if found < best:
                best, kept, kept_step = found, network.weights.snapshot(), step + 1
        left = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
        said = f"held-out KL {best:.4g} (from {before:.4g}), of this step {loss.item():.4g}"
        tell(said, step + 1, left)
    network.weights.restore(kept)
    return Outcome(best, kept_step)


def example_order(count: int, steps: int, seed: int) -> list[int]:
    """Which example each step sees: all of them in a shuffled order, then all in another."""
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(count, generator=draw).tolist()
    return order[:steps]
