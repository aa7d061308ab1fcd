"""Mixtures of experts: the rows of their tensors, how configs name them, and their stacks.

Everywhere in edgellm each expert's weights are matrices of their own, ``[out, in]``. Checkpoints
spell them so too, or stack the experts of a layer in one tensor, as transformers 5 computes with
them and as GGUF stores them: ``ffn_gate_exps`` ``[experts, out, in]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Experts, Layer
from edgellm.architectures.family import Part, TensorRow
from edgellm.tensors import TensorRef

MOST_EXPERTS = 1024
"""Far above any real model, and what llama.cpp has room for (``LLAMA_MAX_EXPERTS``)."""

ROUTER = "ffn_gate_inp.weight"
SHARED_GATE = "ffn_gate_inp_shexp.weight"
"""Ends of the roles of what is multiplied by in float, whatever the rest stands on."""

ROUTER_BIAS = "exp_probs_b.bias"

OF_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps)\.(\d+)\.weight")
"""A weight of one expert: the stem of its stack, and which expert."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a family's checkpoints call the tensors of a layer's mixture, below the layer's name.

    ``experts`` is the module that holds them, ``parts`` an expert's gate, up and down. ``router``,
    ``shared`` and ``shared_gate`` are modules, ``router_bias`` is a tensor. ``gate_up`` and
    ``down`` are whole names of stacks that may be there instead, gate above up in the first.
    ``also`` is another name of the router. ``stacked``: no checkpoint keeps experts apart.
    """

    experts: str = "mlp.experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    gate_up: tuple[str, ...] = ("mlp.experts.gate_up_proj",)
    down: tuple[str, ...] = ("mlp.experts.down_proj",)
    also: tuple[str, ...] = ()
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"
    stacked: bool = False


def expert_role(layer: int, part: str, expert: int) -> str:
    """The role of an expert's weight; ``part`` is ``gate``, ``up`` or ``down``."""
    return f"blk.{layer}.ffn_{part}_exps.{expert}.weight"


def stack_of(role: str) -> str:
    """The role of the stack that an expert's weight is part of; empty for any other role."""
    found = OF_EXPERT.fullmatch(role)
    return f"{found[1]}.weight" if found else ""


def is_router(role: str) -> bool:
    """Whether ``role`` is the weight that experts are chosen by."""
    return role.endswith(ROUTER)


def expert_of(role: str) -> int | None:
    """Which expert of its layer the weight ``role`` belongs to; None for any other role."""
    found = OF_EXPERT.fullmatch(role)
    return int(found[2]) if found else None


def active_weights(decoder: Decoder, tensors: Mapping[str, TensorRef]) -> int:
    """Number of weights that one token passes: all but those of experts that it is not sent to."""
    total = 0.0
    for role, ref in tensors.items():
        layer = int(role.split(".")[1]) if stack_of(role) else -1
        experts = decoder.layers[layer].experts if layer >= 0 else None
        total += ref.size if experts is None else ref.size * experts.used / experts.count
    return round(total)


def mixture_rows(
    experts: Experts, hidden: int, index: int, source: str, spelling: Spelling
) -> Iterator[TensorRow]:
    """The tensors of the feed-forward of layer ``index``, whose name in a checkpoint is ``source``.

    Each expert's three weights, the router and the shared expert.
    """
    role, width = f"blk.{index}", experts.width
    routers = tuple(
        Part(f"{source}.{name}.weight", (experts.count, hidden), 0) for name in spelling.also
    )
    yield TensorRow(
        f"{source}.{spelling.router}.weight",
        f"{role}.{ROUTER}",
        (experts.count, hidden),
        "router",
        elsewhere=routers,
    )
    if experts.router.bias:
        name = f"{source}.{spelling.router_bias}"
        yield TensorRow(name, f"{role}.{ROUTER_BIAS}", (experts.count,), "bias")
    gate_up, down = (experts.count, 2 * width, hidden), (experts.count, hidden, width)
    for expert in range(experts.count):
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        first = {
            "gate": 2 * expert * width,
            "up": (2 * expert + 1) * width,
            "down": expert * hidden,
        }
        for (part, shape), name in zip(shapes.items(), spelling.parts, strict=True):
            stacks = spelling.down if part == "down" else spelling.gate_up
            whole = down if part == "down" else gate_up
            yield TensorRow(
                f"{source}.{spelling.experts}.{expert}.{name}.weight",
                expert_role(index, part, expert),
                shape,
                "linear",
                elsewhere=tuple(Part(f"{source}.{each}", whole, first[part]) for each in stacks),
                apart=not spelling.stacked,
            )
    if experts.shared_width:
        yield from _shared_rows(experts, hidden, role, source, spelling)


def _shared_rows(
    experts: Experts, hidden: int, role: str, source: str, spelling: Spelling
) -> Iterator[TensorRow]:
    width, shared = experts.shared_width, f"{source}.{spelling.shared}"
    if experts.shared_gate:
        name = f"{source}.{spelling.shared_gate}.weight"
        yield TensorRow(name, f"{role}.{SHARED_GATE}", (1, hidden), "router")
    both = (2 * width, hidden)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    first = {"gate": 0, "up": width}
    for (part, shape), name in zip(
        shapes.items(), ("gate_proj", "up_proj", "down_proj"), strict=True
    ):
        # Granite has gate above up here too.
        elsewhere = (
            (Part(f"{shared}.output_linear.weight", shape, 0),)
            if part == "down"
            else (Part(f"{shared}.input_linear.weight", both, first[part]),)
        )
        yield TensorRow(
            f"{shared}.{name}.weight",
            f"{role}.ffn_{part}_shexp.weight",
            shape,
            "linear",
            elsewhere=elsewhere if spelling.stacked else (),
            apart=not spelling.stacked,
        )


def with_mixtures(
    rows: Iterable[TensorRow], decoder: Decoder, spelling: Spelling, prefix: str = "model.layers"
) -> Iterator[TensorRow]:
    """``rows`` of dense layers with the feed-forward of those that have experts exchanged.

    The mixture's rows stand where the products of the dense feed-forward do in ``rows``.
    """
    dense = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)")
    begun: set[int] = set()
    for row in rows:
        found = dense.fullmatch(row.role)
        index = int(found[1]) if found else -1
        experts = decoder.layers[index].experts if found else None
        if experts is None:
            yield row
        elif index not in begun:
            begun.add(index)
            source = f"{prefix}.{index}"
            yield from mixture_rows(experts, decoder.hidden_size, index, source, spelling)


TRAINING = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
"""Keys that say nothing about the maths of a forward pass."""


def skip_training(config: Config) -> None:
    """Mark what concerns training alone as understood."""
    config.skip(*TRAINING)


def read_counts(config: Config, *count: str, used: str = "num_experts_per_tok") -> tuple[int, int]:
    """How many experts a layer has, and how many each token passes.

    ``count``: spellings of the key. Raises ``UnsupportedModel`` for more used than there are.
    """
    key = config.spelled(*count)
    experts = config.integer(key, maximum=MOST_EXPERTS)
    for other in count:
        if other != key and config.has(other):
            config.neutral(other, experts)
    chosen = config.integer(used)
    if chosen > experts:
        raise config.refusal(used, chosen, f"at most the {experts} experts that there are ({key})")
    return experts, chosen


def sparse_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Which layers have experts, by Qwen's keys: every ``decoder_sparse_step``-th.

    Those that ``mlp_only_layers`` lists have none.
    """
    step = config.integer("decoder_sparse_step", 1)
    dense: set[int] = set()
    if config.has("mlp_only_layers"):
        dense = set(config.integers("mlp_only_layers"))
        if dense and not 0 <= min(dense) <= max(dense) < layers:
            raise config.refusal(
                "mlp_only_layers", sorted(dense), f"numbers of layers, 0 to {layers - 1}"
            )
    return tuple(index not in dense and (index + 1) % step == 0 for index in range(layers))


def with_experts(
    layers: Iterable[Layer], experts: Experts, sparse: Sequence[bool] | None = None
) -> tuple[Layer, ...]:
    """``layers`` with ``experts``, in all of them or in those that are ``sparse``."""
    layers = tuple(layers)
    chosen = (True,) * len(layers) if sparse is None else sparse
    return tuple(
        replace(layer, experts=experts if has else None)
        for layer, has in zip(layers, chosen, strict=True)
    )
