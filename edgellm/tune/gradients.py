"""How an error in a product's outputs moves the answers, by gradients of the source itself.

The second derivative of the answers' KL divergence is the mean outer product of gradients of the
logarithm of what the source may answer, drawn by its own probabilities (Fisher's information). Of
each product it is summed up by output, tokens taken for independent: sketch A of YAQA (Tseng, Sun
and De Sa, arXiv 2505.22988, section 3.1). Few tokens, the first of a text above all, have gradients
many times as large as the others' and would be all that counts: none counts for more than the
median of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from edgellm.source.model import ModelSource
from edgellm.tensors import Array
from edgellm.tune import torch_decoder
from edgellm.tune.divergence import logits_of
from edgellm.tune.products import quick_float32
from edgellm.tune.settings import POSITIONS
from edgellm.tune.weights import SourceWeights

Watch = Callable[[int], None]
"""Called with the number of windows that are done."""


@dataclass(frozen=True)
class _WatchedWeights(SourceWeights):
    """Weights that add up ``gradient.T @ gradient`` of what they give, ``[out, out]`` by role."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def product(self, role: str, x: Tensor) -> Tensor:
        found = super().product(role, x)
        found.register_hook(partial(self._add, f"{role}.weight"))  # type: ignore[no-untyped-call]
        return found

    def _add(self, role: str, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        lengths = gradient.norm(dim=-1, keepdim=True)
        clipped = gradient * (lengths.median() / lengths).clamp_max(1.0).nan_to_num_(0.0)
        if role not in self.sums:
            self.sums[role] = torch.zeros(2 * clipped.shape[-1:])
        self.sums[role].addmm_(clipped.T, clipped)


def output_hessians(
    source: ModelSource, windows: Sequence[Sequence[int]], seed: int, watch: Watch
) -> dict[str, Array]:
    """Of the weight of each product but the head's, by role: float32 ``[out, out]``.

    The mean over the tokens of ``windows``, whose answers are drawn by ``seed``. Rows are in the
    order that the network takes. The source is in memory whole.
    """
    decoder = source.decoder
    weights = _WatchedWeights(SourceWeights.load(source.tensors.values(), decoder).tensors)
    head = weights.tensors["token_embd.weight" if decoder.tied_head else "output.weight"]
    draw = torch.Generator().manual_seed(seed)
    with quick_float32():
        for place, window in enumerate(windows):
            stream = torch_decoder.embedded(decoder, weights, torch.tensor([window]))
            stream = stream.detach().requires_grad_()
            for index in range(len(decoder.layers)):
                stream = torch_decoder.layer(decoder, index, weights, stream)
            states = torch_decoder.head_input(decoder, weights, stream)
            by_state = torch.empty_like(states[0])
            for start in range(0, len(by_state), POSITIONS):
                part = slice(start, start + POSITIONS)
                given = states[0, part].detach().requires_grad_()
                logits = logits_of(
                    given, head, weights.vector("output.bias"), decoder.logit_softcap
                )
                likely = torch.softmax(logits.detach(), dim=-1)
                drawn = torch.multinomial(likely, 1, generator=draw)[:, 0]
                loss = functional.cross_entropy(logits, drawn, reduction="sum")
                (by_state[part],) = torch.autograd.grad(loss, given)
            states[0].backward(by_state)  # type: ignore[no-untyped-call]
            watch(place + 1)
    tokens = sum(map(len, windows))
    return {role: total.div_(tokens).numpy() for role, total in weights.sums.items()}
