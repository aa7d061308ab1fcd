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
from edgellm.tune.products import quick_products
from edgellm.tune.settings import Settings, Tell, rate_share
from edgellm.tune.weights import StudentWeights, parameter_groups

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the change that training found, of which the best on the held-out text is kept: what
noise costs falls with the square of the share, and what is gained nearly with the share itself."""

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
    """The mean divergence in nats on the held-out text, and the share of ``SHARES`` (0: none)."""

    after: float
    kept_share: float


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
            products=weights.products,
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
    """Train the weights of ``network`` in place; at the end they hold the best share of the change.

    Judged by the held-out examples, whose divergence is ``before`` now; where no share is better,
    the weights are what they were.
    """
    weights, steps = network.weights, settings.steps
    optimizer = torch.optim.Adam(parameter_groups(weights, settings), betas=BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    sizes = [example.ids.numel() for example in training]
    order = batches_by_step(sizes, steps, settings.step_tokens, settings.seed)
    started = time.perf_counter()
    for step, places in enumerate(order):
        share = rate_share(step, steps, settings.warm_up)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        tokens, divergence = sum(sizes[place] for place in places), 0.0
        with quick_products(weights, settings.products):
            for place in places:
                loss = network.divergence(training[place]) / tokens
                loss.backward()  # type: ignore[no-untyped-call]
                divergence += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        left = (time.perf_counter() - started) / (step + 1) * (steps - step - 1)
        tell(f"KL of this step {divergence:.4g} (held out {before:.4g})", step + 1, left)
    found = weights.snapshot()
    best, kept = before, 0.0
    for share in SHARES:
        weights.restore(found, share)
        after = network.mean_divergence(held_out)
        if after < best:
            best, kept = after, share
    weights.restore(found if kept else None, kept)  # what was found may not even be finite
    return Outcome(best, kept)


def batches_by_step(
    sizes: Sequence[int], steps: int, step_tokens: int, seed: int
) -> list[list[int]]:
    """Which batches each step sees, of those with ``sizes`` tokens: at least ``step_tokens``.

    All come in a shuffled order, then all in another.
    """
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    found: list[list[int]] = []
    for _ in range(steps):
        chosen: list[int] = []
        while sum(sizes[place] for place in chosen) < step_tokens:
            if not order:
                order = torch.randperm(len(sizes), generator=draw).tolist()
            chosen.append(order.pop())
        found.append(chosen)
    return found
