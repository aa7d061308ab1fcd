"""KL divergence between two heads' answers, with its gradient, a slab of positions at a time.

Logits ``[tokens, vocab]`` of a large vocabulary would be the largest thing in memory by far, and
three of them would be alive at once: here they live for ``POSITIONS`` tokens at the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.tune.settings import POSITIONS
from edgellm.tune.weights import Matrix, dequantized, group_gradients


class HeadDivergence(torch.autograd.Function):
    """The sum over positions of KL(teacher || student) in nats.

    ``hidden`` and ``wanted`` are the normed states ``[tokens, hidden]`` that the student's and the
    teacher's head are given. ``bias`` ``[vocab]`` and the soft cap ``cap`` are the same on both
    sides and not trained. Gradients are computed on the way and need no second pass; they are
    multiplied in the type ``products``, logits in float32.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        scales: Tensor | None,
        mins: Tensor | None,
        matrix: Matrix,
        wanted: Tensor,
        teacher: Tensor,
        bias: Tensor | None,
        cap: float | None,
        products: torch.dtype,
    ) -> Tensor:
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        levels = matrix.float_levels()
        head, reference = dequantized(levels, scales, mins), teacher.float()
        total = torch.zeros((), dtype=torch.float64)
        by_hidden = torch.empty_like(hidden) if needed[0] else None
        by_head = torch.zeros_like(head) if needed[1] else None
        factor = head.to(products) if by_hidden is not None else head
        for start in range(0, len(hidden), POSITIONS):
            part = slice(start, start + POSITIONS)
            theirs = torch.log_softmax(logits_of(wanted[part], reference, bias, cap), dim=-1)
            logits = logits_of(hidden[part], head, bias, cap)
            ours = torch.log_softmax(logits, dim=-1)
            likely = theirs.exp()
            total += torch.linalg.vecdot(likely, theirs.sub_(ours)).sum(dtype=torch.float64)
            if by_hidden is None and by_head is None:
                continue
            gradient = ours.exp_().sub_(likely)
            if cap is not None:
                gradient.mul_(1 - (logits / cap).square_())
            gradient = gradient.to(products)
            if by_hidden is not None:
                by_hidden[part] = gradient @ factor
            if by_head is not None:
                by_head += gradient.T @ hidden[part].to(products)
        by_scale = by_min = None
        if by_head is not None and scales is not None:
            by_scale, by_min = group_gradients(by_head, levels, scales, mins)
        ctx.gradients = (by_hidden, by_scale, by_min)  # type: ignore[attr-defined]
        return total.float()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        found = (None if each is None else each * gradient for each in ctx.gradients)
        return (*found, *[None] * 6)


def logits_of(states: Tensor, head: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """``[n, vocab]`` of normed ``states`` ``[n, hidden]``, capped softly where ``cap`` is given."""
    product = states @ head.T
    if bias is not None:
        product += bias
    return product if cap is None else cap * torch.tanh(product / cap)


def head_divergence(
    hidden: Tensor,
    matrix: Matrix,
    wanted: Tensor,
    teacher: Tensor,
    *,
    bias: Tensor | None = None,
    cap: float | None = None,
    products: torch.dtype = torch.float32,
) -> Tensor:
    """``HeadDivergence`` for states ``[..., hidden]``, of the student's head ``matrix``."""
    columns = hidden.shape[-1]
    total = HeadDivergence.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, columns),
        matrix.scales(),
        matrix.mins(),
        matrix,
        wanted.reshape(-1, columns),
        teacher,
        None if bias is None else bias.detach(),
        cap,
        products,
    )
    assert isinstance(total, Tensor)
    return total
