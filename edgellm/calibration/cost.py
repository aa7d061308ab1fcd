"""What calibrating and solving will take: memory, time and room on the disk, by shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.architectures.couplings import couplings
from edgellm.architectures.decoder import Decoder, Layer
from edgellm.architectures.experts import expert_of
from edgellm.calibration.folding import MOST_WEIGHTS
from edgellm.calibration.stream import BUDGET_BYTES
from edgellm.calibration.sums import CHUNK_TOKENS, STRIP_COLUMNS
from edgellm.export.layout import OutputTensor
from edgellm.quant.scaling import SAMPLED_ROWS
from edgellm.slabs import slab_bytes
from edgellm.tensors import TensorRef

FLOPS_PER_SECOND = 70e9
"""Float32 operations that one thread of a 2023 server core does in a second in onnxruntime's
products and BLAS's; a guide, not a promise."""

ATTENTION_SLOWNESS = 3.0
"""How much longer an operation of attention takes than one of a product."""

SOLVED_PER_SECOND = {"hessian": 4e9, "importance": 0.0}
"""Weights times columns that one thread of such a core solves in a second, by what a solver needs;
0 where the time follows the weights alone."""

FACTORED_PER_SECOND = 8e9
"""Cubed columns of a Hessian that one such thread factors in a second."""

SEARCHED_PER_SECOND = 3e6
"""Weights of sampled rows that one such thread searches the factors of a transform for in a
second."""

CONVOLUTION_VALUES = 9
"""Widths of the model that a short convolution computes of a token: B, C and x, what is made of
them, and two slices at a time."""

CONVOLUTION_SQUARES = 4
"""Squares of the model's width in the two products of a short convolution, B, C and x in one."""

RUNS = {"float": 1, "quantized": 2}
"""How often a layer is run over the text."""

RUNTIME_BYTES = 60 << 20
"""onnxruntime, its sessions and its arenas' first pages."""

GPU_SLAB_BYTES = 64 << 20
"""Float32 bytes of the rows that a GPU solves at once: it goes through their columns one by one,
and begins a column as late for a few rows as for many."""

GPU_WORKERS = 2
"""One has the GPU while the other searches for scales, packs and writes."""

SOLVER_COPIES = 10.0
"""Float32 copies of a slab's rows alive at once in a worker that solves them."""

FACTOR_COPIES = 5.0
"""Copies of a Hessian in float32 that its factorization takes for a moment (float64 counts two)
beside the one that is kept of it; measured 5.2 at 3,000 columns."""


@dataclass(frozen=True, slots=True)
class Cost:
    """``memory_bytes`` beside the process as it is and what is rounded without statistics."""

    memory_bytes: int
    seconds: float
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Products' inputs of one kind in a layer: ``width`` columns, ``each`` times for a token.

    ``sums``: how many such inputs statistics are kept of.
    """

    width: int
    each: int = 1
    sums: int = 1


def layer_inputs(decoder: Decoder, layer: Layer) -> list[Inputs]:
    """Attention's, its output's, gate's and down's; of experts all that they get, and each's.

    With latent attention also those of its vectors; of a state-space layer those of the products
    in and out, and of the two between.
    """
    hidden, experts = decoder.hidden_size, layer.experts
    if layer.scan is not None:
        scan = layer.scan
        return [Inputs(hidden), Inputs(scan.inner), Inputs(scan.inner), Inputs(scan.step_rank or 1)]
    found = [Inputs(hidden), Inputs(hidden if layer.convolution else decoder.attended_size)]
    if decoder.latent is not None:
        found += [Inputs(decoder.latent.rank), Inputs(decoder.latent.query_rank or 0)]
    if experts is None:
        return [*found, Inputs(hidden), Inputs(decoder.ffn_size)]
    found.append(Inputs(hidden))
    found += [Inputs(width, experts.used, experts.count) for width in (hidden, experts.width)]
    if experts.shared_width:
        found.append(Inputs(experts.shared_width))
    return found


def layer_weights(decoder: Decoder) -> int:
    """Values of the weights of one layer's products, of the layer that has most."""
    return max(_weights_of(decoder, layer, active=False) for layer in decoder.layers)


def multiplied_weights(decoder: Decoder) -> int:
    """Values of the weights of all layers' products that one token is multiplied by."""
    return sum(_weights_of(decoder, layer, active=True) for layer in decoder.layers)


def _weights_of(decoder: Decoder, layer: Layer, *, active: bool) -> int:
    hidden, experts = decoder.hidden_size, layer.experts
    mixing = _mixing_weights(decoder, layer)
    if not decoder.feed_forward:
        return mixing
    if experts is None:
        return mixing + (3 if decoder.gated_mlp else 2) * hidden * decoder.ffn_size
    passed = experts.used if active else experts.count
    each = 3 * hidden * experts.width
    return mixing + experts.count * hidden + passed * each + 3 * hidden * experts.shared_width


def _mixing_weights(decoder: Decoder, layer: Layer) -> int:
    """Of attention, or of what stands in its place."""
    hidden, query = decoder.hidden_size, decoder.query_size
    if (scan := layer.scan) is not None:
        between = scan.inner * 2 * (scan.step_rank + scan.state) if scan.step_rank else 0
        return hidden * (scan.made + scan.inner) + between
    if layer.convolution is not None:
        return CONVOLUTION_SQUARES * hidden * hidden
    if (latent := decoder.latent) is not None:
        queries = hidden * query
        if latent.query_rank is not None:
            queries = (hidden + query) * latent.query_rank
        expansion = decoder.heads * latent.head_rows * latent.rank
        return queries + hidden * (latent.width + decoder.attended_size) + expansion
    return hidden * (query + 2 * decoder.kv_size) + query * hidden


def pass_cost(
    decoder: Decoder,
    tokens: int,
    window: int,
    threads: int,
    *,
    importance_only: bool,
    layers: str = "float",
) -> Cost:
    """Of the network's pass over the text, without what is solved by it.

    ``layers`` before the one that is solved, as ``passes.CalibrationPass`` has it.
    """
    hidden, attending = decoder.hidden_size, len(decoder.attending)
    scored = decoder.heads * decoder.cache_dim
    attention = 4 * min(window, tokens) * scored * ATTENTION_SLOWNESS
    per_token = RUNS[layers] * (2 * multiplied_weights(decoder) + attending * attention)
    if not importance_only:
        # Of a product with its own transpose half is computed.
        per_token += sum(
            each.width**2 * each.each
            for layer in decoder.layers
            for each in layer_inputs(decoder, layer)
        )
    operations = tokens * (per_token + hidden * hidden)
    stream = stream_bytes(decoder, tokens)
    memory = 4 * layer_weights(decoder) + sums_bytes(decoder, importance_only)
    memory += stream if stream <= BUDGET_BYTES else 0
    memory += threads * _worker_bytes(decoder, window, importance_only)
    return Cost(
        memory_bytes=memory + runtime_bytes(decoder, window, threads),
        seconds=operations / FLOPS_PER_SECOND / threads,
        disk_bytes=2 * stream,
    )


def stream_bytes(decoder: Decoder, tokens: int) -> int:
    """The hidden states between two layers."""
    return 4 * tokens * decoder.hidden_size


def sums_bytes(decoder: Decoder, importance_only: bool) -> int:
    """What is added up of the inputs of one layer."""

    def of_layer(layer: Layer) -> int:
        inputs = layer_inputs(decoder, layer)
        return sum(
            each.sums * (each.width if importance_only else each.width**2) for each in inputs
        )

    return 4 * max(map(of_layer, decoder.layers))


def runtime_bytes(decoder: Decoder, window: int, threads: int) -> int:
    """What onnxruntime computes of a window on each thread, and keeps for the next."""
    hidden = decoder.hidden_size
    query, keys = decoder.heads * decoder.cache_dim, decoder.cache_heads * decoder.cache_dim
    mixed = 3 * query + 6 * keys
    scan = decoder.layers[0].scan
    if scan is not None:
        # Keys, queries and (Mamba 1's) decays of every head, and what they are made of.
        mixed = 4 * scan.made + 3 * (scan.heads or scan.inner) * scan.state
    elif len(decoder.attending) < len(decoder.layers):
        mixed = max(mixed, CONVOLUTION_VALUES * hidden)
    computed = window * (4 * hidden + mixed + _fed(decoder))
    # Over latents scores and what becomes of them are values of the graph, two at a time.
    scores = decoder.heads * window * window * (1 if decoder.latent is None else 2)
    return RUNTIME_BYTES + 4 * threads * (computed + scores)


def _fed(decoder: Decoder) -> int:
    """Values of a token inside of a feed-forward, and in experts what is brought there and back."""

    def of_layer(layer: Layer) -> int:
        experts = layer.experts
        if experts is None:
            return 3 * decoder.ffn_size
        each = 3 * experts.width + 3 * decoder.hidden_size
        return experts.used * each + 3 * experts.shared_width

    return max(map(of_layer, decoder.layers))


def _worker_bytes(decoder: Decoder, window: int, importance_only: bool) -> int:
    """One thread's chunk of inputs, and the products of a strip of them."""

    def of_layer(layer: Layer) -> int:
        inputs = layer_inputs(decoder, layer)
        given = sum(each.width * each.each for each in inputs)
        kept = (CHUNK_TOKENS + window - 1) * (2 * decoder.hidden_size + given)
        largest = max(each.width for each in inputs)
        return kept + (0 if importance_only else min(largest, STRIP_COLUMNS) * largest)

    return 4 * max(map(of_layer, decoder.layers))


def solve_cost(
    tensors: Sequence[OutputTensor],
    threads: int,
    needs: str,
    *,
    on_gpu: bool = False,
) -> Cost:
    """Of solving ``tensors``, the products of one layer (or the head), beside their statistics.

    The time is the CPU's, ``on_gpu`` too; the GPU's own memory is not counted.
    """
    solved = [tensor for tensor in tensors if tensor.grid.kind != "float"]
    if not solved:
        return Cost(0, 0.0, 0)
    rate = SOLVED_PER_SECOND[needs]
    columns = _inputs_of(solved)
    seconds = sum(_work_of(tensor) for tensor in solved) / rate / threads if rate else 0.0
    most_bytes, workers = solving_slabs(threads, on_gpu)
    busy = [SOLVER_COPIES * max(slab_bytes(tensor, most_bytes) for tensor in solved)] * workers
    memory = 0.0
    if needs == "hessian":
        seconds += sum(width**3 for width in columns) / FACTORED_PER_SECOND / threads
        factors = [4 * width * width for width in columns]
        memory = sum(factors)
        busy += [FACTOR_COPIES * factor for factor in factors]
    # A thread factors or solves; the others wait for a factor that they need too.
    memory += sum(sorted(busy, reverse=True)[:workers])
    return Cost(int(memory), seconds, 0)


def _inputs_of(solved: Sequence[OutputTensor]) -> list[int]:
    """The columns of each input that is solved by; gate and up of an expert share theirs."""
    found: set[tuple[int, int | None, bool]] = set()
    for tensor in solved:
        for part in tensor.parts:
            expert = expert_of(part.role)
            down = expert is not None and "ffn_down" in part.role
            found.add((tensor.columns, expert, down))
    return sorted(columns for columns, _, _ in found)


def search_seconds(decoder: Decoder, tensors: Mapping[str, TensorRef], threads: int) -> float:
    """What a transform takes to find factors: by the rows that it looks at of every weight."""
    searched = 0
    for coupling in couplings(decoder):
        rows = [min(tensors[role].rows, SAMPLED_ROWS) for role in coupling.consumers]
        searched += coupling.columns * sum(sorted(rows)[-MOST_WEIGHTS:])
    return searched / SEARCHED_PER_SECOND / threads


def solving_slabs(threads: int, on_gpu: bool) -> tuple[int | None, int]:
    """Bytes of the slabs that are solved, None for the usual, and how many are at once."""
    return (GPU_SLAB_BYTES, min(threads, GPU_WORKERS)) if on_gpu else (None, threads)


def _work_of(tensor: OutputTensor) -> float:
    return float(tensor.rows) * tensor.columns * tensor.columns
