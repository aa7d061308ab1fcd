"""Short convolutions of the decoder graph, whose state of a sequence is an input and an output.

``past.N.conv`` and ``present.N.conv`` ``[batch, channels, width - 1]``, as onnxruntime-genai names
them: what the last tokens gave to the convolution, the oldest first, and zeros before the first.
Both may share one buffer, for the one is read whole before the other is written. Prompts of a batch
that are padded at their ends keep what their own last tokens gave.

onnxruntime multiplies values as they lie, token by token, so that nothing need be turned round but
the state; the sum over the width is as many products of whole slices. Of 128 tokens of 2,048
channels by 3 that took 0.21 ms, CausalConvWithState between two transpositions 0.60, and of one
token 13 us and 14.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgellm.export.onnx_graph import GraphBuilder


def gated_convolution(
    graph: GraphBuilder,
    index: int,
    parts: str,
    weight: str,
    bias: str | None,
    width: int,
    channels: int,
    *,
    cached: bool,
) -> str:
    """What the output product of layer ``index`` is given, ``[batch, sequence, channels]``.

    ``parts`` ``[batch, sequence, 3 * channels]`` are B, C and x of ``ShortConvolution``; the others
    are as ``convolved`` takes them.
    """
    name = f"blk.{index}.shortconv"
    into, gate, x = (f"{name}.{part}" for part in ("b", "c", "x"))
    sizes = graph.integers(channels, channels, channels)
    graph.node("Split", [parts, sizes], f"{name}.parts", outputs=[into, gate, x], axis=-1)
    given = graph.node("Mul", [into, x], f"{name}.given")
    mixed = convolved(graph, index, name, given, weight, bias, width, channels, cached=cached)
    return graph.node("Mul", [gate, mixed], f"{name}.gated")


def convolved(
    graph: GraphBuilder,
    index: int,
    name: str,
    given: str,
    weight: str,
    bias: str | None,
    width: int,
    channels: int,
    *,
    cached: bool,
) -> str:
    """``given`` and what came before it, by ``weight`` ``[channels, 1, width]``, and the bias.

    ``[batch, sequence, channels]``, every channel by itself. Not ``cached``: the sequence begins
    with the step, and no state is read or written.
    """
    whole = _with_past(graph, index, name, given, width - 1, channels, cached=cached)
    turned = graph.node("Transpose", [weight], f"{name}.by_age", perm=[2, 1, 0])
    by_age = [f"{name}.weight_{age}" for age in range(width - 1, -1, -1)]
    ones = graph.integers(*[1] * width)
    graph.node("Split", [turned, ones], f"{name}.weights", outputs=by_age, axis=0)
    total = ""
    for place, factors in enumerate(by_age):
        age, values = width - 1 - place, given
        if age:
            ends = [graph.integers(at) for at in (place, -age)]
            values = graph.node("Slice", [whole, *ends, graph.integers(1)], f"{name}.ago_{age}")
        product = graph.node("Mul", [values, factors], f"{name}.product_{age}")
        total = graph.node("Add", [total, product], f"{name}.sum_{age}") if total else product
    return total if bias is None else graph.node("Add", [total, bias], f"{name}.biased")


def own_tokens(graph: GraphBuilder) -> str:
    """How many tokens of the step are of each sequence, ``[batch]``.

    A prompt that is padded at its end has fewer than the step.
    """
    name = "step.own_tokens"
    if not graph.has(name):
        one = graph.constant("int64_at_1", np.asarray(1, np.int64))
        step = graph.node("Shape", ["input_ids"], "step.length", start=1, end=2)
        last = graph.node("Cast", ["seqlens_k"], "step.last", to=TensorProto.INT64)
        held = graph.node("Add", [last, one], "step.held")
        graph.node("Min", [held, step], name)
    return name


def _with_past(
    graph: GraphBuilder,
    index: int,
    name: str,
    given: str,
    before: int,
    channels: int,
    *,
    cached: bool,
) -> str:
    """``given`` behind the ``before`` tokens that came before, ``[batch, before + n, channels]``.

    Where ``cached``, the state is read and written too.
    """
    if not cached:
        return graph.node("Pad", [given, graph.integers(0, before, 0, 0, 0, 0)], f"{name}.whole")
    shape: list[int | str] = ["batch_size", channels, before]
    past = graph.input(f"past.{index}.conv", graph.element, shape)
    held = graph.node("Transpose", [past], f"{name}.held", perm=[0, 2, 1])
    whole = graph.node("Concat", [held, given], f"{name}.whole", axis=1)
    last = graph.node("GatherND", [whole, _last(graph, before)], f"{name}.last", batch_dims=1)
    present = graph.node("Transpose", [last], f"present.{index}.conv", perm=[0, 2, 1])
    graph.output(present, graph.element, shape)
    return whole


def _last(graph: GraphBuilder, count: int) -> str:
    """Where each sequence's last ``count`` tokens lie behind its past, ``[batch, count, 1]``."""
    name = f"step.last_{count}"
    if not graph.has(name):
        first = graph.node("Unsqueeze", [own_tokens(graph), graph.integers(1)], f"{name}.first")
        places = graph.node("Add", [first, graph.integers(*range(count))], f"{name}.places")
        graph.node("Unsqueeze", [places, graph.integers(2)], name)
    return name
