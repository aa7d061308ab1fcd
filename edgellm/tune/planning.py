"""What tuning will do and take, known before a weight is read; needs no torch itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from msgspec.structs import replace

from edgellm.architectures.decoder import Decoder, Feature
from edgellm.calibration.cost import FACTOR_COPIES, layer_weights
from edgellm.calibration.planning import tokens_of
from edgellm.calibration.texts import WINDOW_TOKENS, CalibrationText, calibration_windows
from edgellm.errors import RuntimeMissing, UnsupportedTarget, UsageError
from edgellm.export.layout import Layout, OutputTensor
from edgellm.hardware import detect_cpu
from edgellm.quant.coupled import couples
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.recipe import Recipe
from edgellm.slabs import slab_rows
from edgellm.source.model import ModelSource
from edgellm.tensors import TensorRef
from edgellm.tune.settings import (
    BATCH_TOKENS,
    BLOCK_RATE,
    FIXED_GRIDS,
    GRADIENT_TOKENS,
    MOST_HELD_OUT,
    NORM_RATE,
    POSITIONS,
    RATE,
    RATE_BITS,
    Settings,
    split,
    tokens_for,
)

FLOPS_PER_SECOND = {"float32": 80e9, "bfloat16": 140e9}
"""Operations that one thread of a 2024 server core does in a second over a whole step, by the type
that is multiplied; a guide, not a promise."""

BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16"}
"""Features of a CPU with which torch multiplies bfloat16 faster than float32."""

PASSES = 3
"""Products of a step by those of one forward pass: the gradients of inputs and of weights too."""

TRAINED_COPIES = 9
"""Float32 copies of all that is trained: base, unit, change, gradient, two moments of Adam, the
best so far, and two of what is made of them in a step."""

RUNTIME_BYTES = 350 << 20
"""torch, as it stands in memory."""

SCATTERED = 1.1
"""What the heap holds of training by what is alive: pieces that are free lie between others."""


@dataclass(frozen=True)
class Tuning:
    """How an artifact will be tuned, and on what.

    ``whole``: end to end after the blocks. ``recompute``: layers are computed twice to save memory;
    the result is the same. ``memory_bytes`` beside the process as it is; ``hessian_bytes`` stay in
    memory while codes are solved.
    """

    settings: Settings
    text: CalibrationText
    whole: bool
    recompute: bool
    memory_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    hessian_bytes: int = 0

    def gradient_windows(self) -> list[tuple[int, ...]]:
        """Windows whose gradients couple rows: the first of those that are trained on."""
        windows, _ = split(self.text.windows)
        before = accumulate(map(len, windows), initial=0)
        wanted = self.settings.gradient_tokens
        return [window for window, start in zip(windows, before, strict=False) if start < wanted]


def plan_tuning(
    recipe: Recipe,
    layout: Layout,
    source: ModelSource,
    threads: int,
    free_bytes: int,
) -> Tuning | None:
    """How ``recipe`` will tune what it makes, None where it does not.

    It reads the text that calibration does, and further on in it. ``free_bytes``: memory that may
    be taken.
    Raises ``UnsupportedTarget`` for mixtures of experts, state-space layers, latents that GGUF has
    in two stacks and norms by head in a Hugging Face folder, ``RuntimeMissing`` without torch, and
    ``UsageError`` where nothing can be trained, for a text that is too short, and where not even
    one block fits.
    """
    if recipe.tune is None:
        return None
    if any(layer.experts for layer in source.decoder.layers):
        raise UnsupportedTarget(
            f"--tune trains dense networks, and {source.decoder.family} models are mixtures of "
            "experts: leave it out; --quant gptq:GRID makes good what rounding loses"
        )
    if layout.container == "gguf" and source.family.gguf_layout.absorbed:
        raise UnsupportedTarget(
            "--tune reads weights back whole, and GGUF has what makes keys and values of latent "
            "vectors in two stacks: leave it out, or choose --format onnx"
        )
    if layout.container == "hf" and source.decoder.qk_norm_by_head:
        raise UnsupportedTarget(
            "--tune trains norms too, and a Hugging Face folder of this model has those of heads "
            "in tensors that it does not read back: leave it out, or choose --format gguf or onnx"
        )
    if Feature.STATE_SPACE in source.decoder.features():
        raise UnsupportedTarget(
            f"--tune: {source.decoder.family} has {Feature.STATE_SPACE}, through which edgellm "
            "does not train; leave --tune out, or choose gptq or awq+gptq"
        )
    if importlib.util.find_spec("torch") is None:
        raise RuntimeMissing(
            "--tune trains with torch, which is not installed: pip install 'edgellm[calibrate]', "
            "or leave --tune out"
        )
    trained = [tensor for tensor in layout.model_tensors if trains_scales(tensor)]
    if not trained:
        names = ", ".join(sorted({tensor.grid.name for tensor in layout.model_tensors}))
        raise UsageError(
            f"--tune moves scales while codes stay, and no tensor has scales that can move: the "
            f"grids are {names}; leave --tune out, or choose another --quant"
        )
    drawn = calibration_windows(
        source.tokenizer,
        recipe.calibration,
        tokens=max(tokens_of(recipe), tokens_for(recipe.tune)),
        seed=recipe.seed or 0,
        context=source.decoder.context_length,
    )
    split(drawn.windows)
    quick = bool(BFLOAT16_FEATURES & detect_cpu()[1].value)
    share = rate_share_of(trained)
    settings = Settings(
        steps=recipe.tune,
        products="bfloat16" if quick else "float32",
        rate=share * RATE,
        norm_rate=share * NORM_RATE,
        block_rate=share * BLOCK_RATE,
        seed=recipe.seed or 0,
    )
    decoder = source.decoder
    ways = [
        (True, False, whole_bytes(decoder, layout, drawn.tokens, recompute=False)),
        (True, True, whole_bytes(decoder, layout, drawn.tokens, recompute=True)),
        (False, False, blocks_bytes(decoder, layout, drawn.tokens)),
    ]
    fitting = [way for way in ways if way[2] <= free_bytes]
    if not fitting:
        raise UsageError(
            f"--tune takes about {ways[-1][2] / 1e9:.1f} GB of memory even block by block, and "
            f"{free_bytes / 1e9:.1f} GB are free: take fewer steps, or leave --tune out"
        )
    whole, recompute, nbytes = fitting[0]
    notes: list[str] = []
    hessians = 0
    coupled = [
        tensor
        for tensor in layout.model_tensors
        if tensor.role.startswith("blk.") and couples(tensor.grid)
    ]
    if recipe.solver == "gptq" and coupled:
        coupling = gradient_bytes(decoder, layout)
        if coupling <= free_bytes:
            tokens = min(tokens_of(recipe), GRADIENT_TOKENS)
            settings = replace(settings, gradient_tokens=tokens)
            rows = max(min(tensor.rows, slab_rows(tensor)) for tensor in coupled)
            hessians = hessian_bytes(layout) + threads * int(4 * (1 + FACTOR_COPIES) * rows**2)
            nbytes = max(nbytes, coupling)
        else:
            notes.append(
                "rows are solved apart: the gradients that couple them would take about "
                f"{coupling / 1e9:.1f} GB of memory, and {free_bytes / 1e9:.1f} GB are free"
            )
    if not whole:
        settings = replace(settings, steps=0, block_steps=recipe.tune)
        notes.append(
            f"tuned block by block alone: end to end would take about {ways[1][2] / 1e9:.1f} GB of "
            f"memory, and {free_bytes / 1e9:.1f} GB are free"
        )
    return Tuning(
        settings=settings,
        text=drawn,
        whole=whole,
        recompute=recompute,
        memory_bytes=nbytes,
        seconds=seconds_of(decoder, settings, drawn, threads, recompute=recompute),
        notes=tuple(notes),
        hessian_bytes=hessians,
    )


def rate_share_of(trained: Sequence[OutputTensor]) -> float:
    """The share of the rates for 4 bits at which tensors of more bits are trained.

    What is to be made good is half as large with each bit more, on average over the weights of
    layers. SmolLM2 in q4_k_m, most of it in 5 bits, KL on held-out windows by that before training:
    0.92 at the full rate, of which half of the change was kept, and 0.91 at 0.49 of it.
    """
    layers = [tensor for tensor in trained if tensor.role.startswith("blk.")] or trained
    sizes = [tensor.rows * tensor.columns for tensor in layers]
    total = sum(size * tensor.grid.bits for size, tensor in zip(sizes, layers, strict=True))
    return min(1.0, float(2.0 ** (RATE_BITS - total / sum(sizes))))


def trains_scales(tensor: OutputTensor) -> bool:
    """Whether ``tensor`` has codes that stay and scales that may move."""
    grid = tensor.grid
    return grid.kind != "float" and grid.name not in (*VECTOR_CODEBOOKS, *FIXED_GRIDS)


def whole_bytes(decoder: Decoder, layout: Layout, tokens: int, *, recompute: bool) -> int:
    """What training end to end takes: all codes, what is trained, one step's activations."""
    tensors = layout.model_tensors
    codes = sum(_code_bytes(tensor) for tensor in tensors)
    trained = 4 * TRAINED_COPIES * sum(map(_trained_numbers, tensors))
    by_layer = BATCH_TOKENS * layer_activation_bytes(decoder)
    streams = BATCH_TOKENS * 4 * decoder.hidden_size * len(decoder.layers)
    activations = by_layer + streams if recompute else by_layer * len(decoder.layers)
    table = 4 * decoder.vocab_size * decoder.hidden_size
    # The source's head as it is kept and in float32; the student's in both types that products are
    # taken in, its levels, its gradient and what is added to that; what a slab's logits become.
    head = 8.5 * table + 28 * POSITIONS * decoder.vocab_size
    largest = max(4 * tensor.rows * tensor.columns for tensor in tensors)
    states = 4 * tokens * decoder.hidden_size
    alive = codes + trained + activations + head + largest + states
    return int(RUNTIME_BYTES + SCATTERED * alive)


def blocks_bytes(decoder: Decoder, layout: Layout, tokens: int) -> int:
    """What training one block after another takes: both streams, one block, its activations."""
    layers: dict[str, list[OutputTensor]] = {}
    for tensor in layout.model_tensors:
        if tensor.role.startswith("blk."):
            layers.setdefault(tensor.role.split(".")[1], []).append(tensor)
    weights = max(sum(tensor.rows * tensor.columns for tensor in each) for each in layers.values())
    trained = 4 * sum(map(_trained_numbers, layout.model_tensors))
    # The source's block, the codes and what is made of one of them; the tables of both at first.
    block = (4 + 1 + 3) * weights
    tables = 9 * decoder.vocab_size * decoder.hidden_size
    streams = 2 * 4 * tokens * decoder.hidden_size
    activations = BATCH_TOKENS * layer_activation_bytes(decoder)
    return RUNTIME_BYTES + trained + max(block + activations, tables) + streams


def hessian_bytes(layout: Layout) -> int:
    """What couples the rows of all weights but the tables."""
    return 4 * sum(part.rows**2 for part in _products(layout))


def gradient_bytes(decoder: Decoder, layout: Layout) -> int:
    """What the gradients of the source take: its weights, a window's activations, the sums."""
    tables = 4 * decoder.vocab_size * decoder.hidden_size * (1 if decoder.tied_head else 2)
    weights = 4 * sum(part.rows * part.columns for part in _products(layout)) + tables
    activations = WINDOW_TOKENS * layer_activation_bytes(decoder) * len(decoder.layers)
    logits = 20 * POSITIONS * decoder.vocab_size
    return RUNTIME_BYTES + weights + activations + logits + hessian_bytes(layout)


def _products(layout: Layout) -> list[TensorRef]:
    """The weights of layers that are multiplied by."""
    return [
        part
        for tensor in layout.model_tensors
        for part in tensor.parts
        if part.role.startswith("blk.") and len(part.shape) == 2
    ]


def layer_activation_bytes(decoder: Decoder) -> int:
    """What one layer keeps of a token for the way back, as measured on Llama-shaped layers."""
    hidden, ffn = decoder.hidden_size, decoder.ffn_size
    heads = 4 * decoder.query_size + 2 * decoder.kv_size
    return 4 * (8 * hidden + heads + (5 if decoder.gated_mlp else 3) * ffn)


def seconds_of(
    decoder: Decoder, settings: Settings, text: CalibrationText, threads: int, *, recompute: bool
) -> float:
    """A guess of the time: the source's pass over the text, blocks, and steps end to end."""
    layers = len(decoder.layers)
    layer = 2 * layer_weights(decoder)
    head = 2 * decoder.vocab_size * decoder.hidden_size
    passes = 2 if settings.block_steps else 1
    step = settings.step_tokens
    seen = max(settings.steps, settings.block_steps) * step + MOST_HELD_OUT * WINDOW_TOKENS
    operations = passes * min(text.tokens, seen) * layers * layer
    operations += settings.block_steps * step * layers * PASSES * layer
    whole = (PASSES + recompute) * layers * layer + (PASSES + 1) * head
    operations += settings.steps * step * whole
    gradients = settings.gradient_tokens * PASSES * (layers * layer + head)
    seconds = operations / FLOPS_PER_SECOND[settings.products]
    return (seconds + gradients / FLOPS_PER_SECOND["float32"]) / threads


def _code_bytes(tensor: OutputTensor) -> int:
    """A byte a code; floats as they are stored."""
    values = tensor.rows * tensor.columns
    if tensor.grid.kind == "float":
        return values * int(tensor.grid.bits) // 8
    return values if trains_scales(tensor) else 4 * values


def _trained_numbers(tensor: OutputTensor) -> int:
    """Scales and minima of a matrix, all of a vector."""
    if len(tensor.parts[0].shape) == 1:
        return tensor.columns
    if not trains_scales(tensor):
        return 0
    groups = tensor.rows * (tensor.columns // tensor.grid.block if tensor.grid.block else 1)
    one = tensor.grid.symmetric or (tensor.grid.kind == "affine" and not tensor.grid.minima)
    return groups if one else 2 * groups
