"""What a conversion will calibrate with and what that takes, known before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgellm.calibration.blocks import HEAD, Block, blocks_of, grids_by_role, heads_among
from edgellm.calibration.cost import (
    Cost,
    pass_cost,
    runtime_bytes,
    search_seconds,
    solve_cost,
    stream_bytes,
    sums_bytes,
)
from edgellm.calibration.folding import Folding
from edgellm.calibration.given import GivenImportance, given_importance
from edgellm.calibration.splitting import Splitting
from edgellm.calibration.stream import BUDGET_BYTES
from edgellm.calibration.texts import (
    CALIBRATION_TOKENS,
    WINDOW_TOKENS,
    CalibrationText,
    calibration_windows,
)
from edgellm.calibration.transforms import plan_transforms
from edgellm.errors import UsageError
from edgellm.export.layout import Layout
from edgellm.quant import SOLVERS, TRANSFORMS, Needs
from edgellm.quant.devices import torch_name
from edgellm.quant.grid import GRIDS, Grid
from edgellm.recipe import DEFAULT_SOLVER, Recipe, check_calibration, split_quant
from edgellm.source.model import ModelSource
from edgellm.tune.settings import tokens_for

PREFERRED_SOLVER = "gptq"

PREFERRED_TRANSFORM = "awq"
"""What comes before ``PREFERRED_SOLVER`` where activations are rounded too, and no adapters will
stand beside the model: those made for the original do not fit beside one with scaled channels.

SmolLM2's KL in llama.cpp with it by without, built-in text: q2_k 0.1279 by 0.1417, q3_k_m 0.0634 by
0.0648, q4_0 0.0800 by 0.0838, q4_1 0.0509 by 0.0521, q4_k_m 0.0235 by 0.0263, iq4_nl 0.0611 by
0.0646, iq4_xs 0.0634 by 0.0666, q5_0 0.0222 by 0.0240, q5_1 0.0148 by 0.0156, q5_k_m 0.0136 by
0.0162, q6_k 0.0041 by 0.0072; on text of the judged kind q4_0 0.0516 by 0.0571, iq4_xs 0.0428 by
0.0471, q3_k_m 0.0423 by 0.0455, q4_k_m 0.0162 by 0.0196.
"""

ROUNDING_ACTIVATIONS = ("gguf",)
"""Containers whose runtime rounds what weights are multiplied by, whatever their grid.

Beside Hugging Face and MLX folders other programs put adapters, and do not see how the folders were
made. KL of dequantized Hugging Face folders of SmolLM2 with ``awq`` by without, 16,384 tokens of
calibration: int4-g64-sym 0.1041 by 0.1075, int4-g32 0.0639 by 0.0720. ONNX itself and nf4 were not
measured.
"""

PATIENCE_S = 600.0
"""A calibrated solver that nobody named is chosen when it is expected to take less."""

ENOUGH_BITS = 8
"""Codes of so many bits are as good as exact however they are rounded (SmolLM2's KL: 0.003)."""


@dataclass(frozen=True)
class Calibration:
    """The text, the network that reads it, and the blocks that are rounded by what is found.

    ``source`` is the model before any transform; ``folding`` changes what the layout loads.
    ``needs``: what is gathered of each input, ``weighs``: with tokens counted by
    ``passes.token_weights``, ``layers``: behind which (``passes.CalibrationPass``). ``notes``:
    facts that the user should be shown. With ``given`` importance there is no ``text``, and nothing
    is run.
    """

    text: CalibrationText | None
    source: ModelSource
    folding: Folding | Splitting | None
    blocks: tuple[Block, ...]
    needs: Needs
    cost: Cost
    notes: tuple[str, ...] = ()
    given: GivenImportance | None = None
    layers: str = "float"
    weighs: bool = False

    @property
    def follows(self) -> bool:
        """Whether layers are run as they were rounded."""
        return self.layers != "float"

    @property
    def sha256(self) -> str:
        """Digest of what is calibrated with: of the token ids, or of the given file."""
        if self.given is not None:
            return self.given.sha256
        assert self.text is not None
        return self.text.sha256


def tokens_of(recipe: Recipe) -> int:
    """Tokens of text to calibrate on: as asked for, else all that tuning reads where there is any.

    What is read for training anyway makes better statistics of inputs for a twentieth of its time.
    """
    if recipe.calibration_tokens is not None:
        return recipe.calibration_tokens
    return max(CALIBRATION_TOKENS, tokens_for(recipe.tune) if recipe.tune is not None else 0)


def _with_preferred(recipe: Recipe, *, scaled: bool) -> str:
    """``recipe.quant`` with the solver that loses least, and the transform before it."""
    quant = split_quant(recipe.quant or "")
    if scaled:
        quant = quant._replace(transforms=quant.transforms or (PREFERRED_TRANSFORM,))
    return str(quant._replace(solver=PREFERRED_SOLVER))


def linear_grids(layout: Layout, source: ModelSource) -> dict[str, Grid]:
    """The grid of every product's weight, by role; floats too."""
    tied = source.decoder.tied_head
    tensors = layout.model_tensors
    layers = [tensor for tensor in tensors if _is_product(tensor.parts[0].role, tensor.shape)]
    heads = [tensors[place] for place in heads_among(tensors, tied=tied)]
    return grids_by_role([*layers, *heads], tied=tied)


def with_likely_solver(recipe: Recipe) -> Recipe:
    """``recipe`` with the solver that ``choose_solver`` will most likely choose.

    The grid alone says, before anything is laid out; no transform comes before it yet.
    """
    quant = split_quant(recipe.quant or "")
    grid = GRIDS.get(quant.grid)
    if quant.solver is not None or quant.transforms or (grid and grid.bits >= ENOUGH_BITS):
        return recipe
    if recipe.imatrix is not None:
        return msgspec.structs.replace(recipe, quant=str(quant._replace(solver="imatrix")))
    return msgspec.structs.replace(recipe, quant=_with_preferred(recipe, scaled=False))


def choose_solver(
    recipe: Recipe, layout: Layout, source: ModelSource, threads: int, memory_bytes: int
) -> tuple[Recipe, str]:
    """``recipe`` with a solver where none was named and one matters, and a line that says why.

    The line is empty where there is nothing to say: a solver was named, or the body's codes have so
    many bits that rounding is as good as exact, or are kept as they are stored. Channels are scaled
    first where ``PREFERRED_TRANSFORM`` says, unless stored codes are kept.
    """
    quant = split_quant(recipe.quant or "")
    grids = linear_grids(layout, source)
    kept = {part.role for tensor in layout.tensors if tensor.keeps_codes for part in tensor.parts}
    body = [grid for role, grid in grids.items() if role.startswith("blk.") and role not in kept]
    bits = min((grid.bits for grid in body), default=32)
    if quant.solver is None and quant.transforms and recipe.solver != DEFAULT_SOLVER:
        chosen = msgspec.structs.replace(recipe, quant=str(quant._replace(solver=recipe.solver)))
        return chosen, (
            f"solver {recipe.solver}: its search for each group's scale is {quant.transforms[0]}'s "
            f"clipping; --quant {_with_preferred(recipe, scaled=True)} loses less, and takes longer"
        )
    if quant.solver is not None or quant.transforms or bits >= ENOUGH_BITS:
        return recipe, ""
    if recipe.imatrix is not None:
        chosen = msgspec.structs.replace(recipe, quant=str(quant._replace(solver="imatrix")))
        return chosen, "solver imatrix: importance was given"
    scaled = layout.container in ROUNDING_ACTIVATIONS and not (recipe.keep_adapters or kept)
    preferred = _with_preferred(recipe, scaled=scaled)
    plain = str(quant._replace(solver=DEFAULT_SOLVER))
    chosen = msgspec.structs.replace(recipe, quant=preferred)
    cost = cost_of(chosen, layout, source, tokens_of(recipe), threads)
    minutes = f"{cost.seconds / 60:.0f} min" if cost.seconds >= 90 else f"{cost.seconds:.0f} s"
    too_slow = cost.seconds >= PATIENCE_S and recipe.tune is None
    if too_slow or cost.memory_bytes > memory_bytes:
        why = f"{PREFERRED_SOLVER} would take about {minutes}"
        if cost.memory_bytes > memory_bytes:
            why = f"{PREFERRED_SOLVER} would need about {cost.memory_bytes / 1e9:.1f} GB of memory"
        reason = f"solver {DEFAULT_SOLVER}: {why} here; --quant {preferred} loses less"
        return msgspec.structs.replace(recipe, quant=plain), reason
    reason = (
        f"solver {PREFERRED_SOLVER}: makes good its own rounding errors on a calibration text, "
        f"about {minutes}; --quant {plain} rounds at once, and loses more"
    )
    if scaled:
        reason += (
            f"; {PREFERRED_TRANSFORM} scales channels before it: adapters of the original fit "
            f"only beside --quant {_with_preferred(recipe, scaled=False)}"
        )
    return chosen, reason


def plan_calibration(
    recipe: Recipe,
    layout: Layout,
    source: ModelSource,
    lay_out: Callable[[ModelSource], Layout],
    threads: int,
) -> tuple[Layout, Calibration | None]:
    """What ``recipe``'s solver and transforms need, and the layout with what transforms change.

    None where they need nothing. Raises ``UsageError`` for a calibration that nothing would heed,
    for weights that stay floats, and what reading the text raises.
    """
    needs = SOLVERS[recipe.solver].needs
    if needs == "nothing" and not recipe.transforms:
        check_calibration(recipe)
        return layout, None
    grids = linear_grids(layout, source)
    if all(grid.kind == "float" for grid in grids.values()):
        raise UsageError(
            f"--quant {recipe.quant}: all weights stay floats, so there is nothing to solve; "
            f"choose --quant {recipe.grid}"
        )
    if recipe.follows and needs != "hessian":
        raise UsageError(
            f"calibrate_on {recipe.layers}: {recipe.solver} cannot make good what the layers "
            f"before have lost: choose --quant {_with_preferred(recipe, scaled=False)}, or leave "
            "it out"
        )
    if recipe.transforms:
        if recipe.keep_adapters:
            raise UsageError(
                f"{recipe.transforms[0]} scales the inputs that adapters beside the model are made "
                "for: merge them (leave out --keep-adapters), or choose a --quant without it"
            )
        needs = "hessian" if needs == "hessian" else "importance"
    folded, folding = plan_transforms(source, recipe.transforms, grids, recipe.solver)
    if folding is not None:
        layout = lay_out(folded)
    if isinstance(folding, Splitting):
        folding.check_laid_out(layout)
        if recipe.tune is not None or recipe.follows:
            option = "--tune" if recipe.tune is not None else f"calibrate_on {recipe.layers}"
            raise UsageError(
                f"{option} reads rounded weights back whole, and {recipe.transforms[-1]} takes "
                "columns out of them: leave one of the two out"
            )
    tensors, decoder = layout.tensors, source.decoder
    blocks = tuple(blocks_of(tensors, len(decoder.layers), tied=decoder.tied_head))
    if recipe.imatrix is not None:
        given = _given(recipe, source, grids)
        return layout, Calibration(
            text=None,
            source=source,
            folding=None,
            blocks=blocks,
            needs="importance",
            cost=Cost(0, 0.0, 0),
            notes=given.notes,
            given=given,
        )
    text = calibration_windows(
        source.tokenizer,
        recipe.calibration,
        tokens=tokens_of(recipe),
        seed=recipe.seed or 0,
        context=source.decoder.context_length,
    )
    return layout, Calibration(
        text=text,
        source=source,
        folding=folding,
        blocks=blocks,
        needs=needs,
        cost=cost_of(recipe, layout, source, text.tokens, threads, needs),
        layers=recipe.layers,
        weighs=needs == "hessian" or bool(recipe.transforms),
        notes=(*text.notes, *folded.notes[len(source.notes) :]),
    )


def _given(recipe: Recipe, source: ModelSource, grids: Mapping[str, Grid]) -> GivenImportance:
    """The importance that the recipe names a file of; refuses what contradicts it."""
    if recipe.transforms:
        raise UsageError(
            f"{recipe.transforms[0]} chooses its factors while the model reads a text, which "
            f"--imatrix takes the place of: choose --quant imatrix:{recipe.grid}, or leave "
            "--imatrix out"
        )
    if SOLVERS[recipe.solver].needs == "hessian":
        raise UsageError(
            f"an importance matrix says how strong each channel is, and {recipe.solver} must know "
            f"how they go together: choose --quant imatrix:{recipe.grid}, or leave --imatrix out"
        )
    for name in ("calibration", "calibration_tokens", "calibrate_on", "seed"):
        if getattr(recipe, name) is not None and not (name == "seed" and recipe.adapters):
            raise UsageError(
                f"{name} is about a text to calibrate on, and --imatrix takes its place: leave one "
                "of them out"
            )
    assert recipe.imatrix is not None
    widths = {role: source.tensors[role].columns for role in grids}
    head = "token_embd.weight" if source.decoder.tied_head else HEAD
    floats = {role for role, grid in grids.items() if grid.kind == "float"}
    return given_importance(Path(recipe.imatrix), widths, head, floats)


def cost_of(
    recipe: Recipe,
    layout: Layout,
    source: ModelSource,
    tokens: int,
    threads: int,
    needs: Needs = "hessian",
) -> Cost:
    """What calibrating on ``tokens`` and solving takes, beside what is rounded without."""
    decoder = source.decoder
    on_gpu = torch_name(recipe.device) is not None
    window = min(WINDOW_TOKENS, decoder.context_length)
    diagonal = needs != "hessian"
    passing = pass_cost(
        decoder, tokens, window, threads, importance_only=diagonal, layers=recipe.layers
    )
    blocks = blocks_of(layout.tensors, len(decoder.layers), tied=decoder.tied_head)
    solving = [
        solve_cost(
            [layout.tensors[place] for place in block.tensors], threads, needs, on_gpu=on_gpu
        )
        for block in blocks
        if block.unit is not None
    ]
    searching = 0.0
    if any(name in TRANSFORMS for name in recipe.transforms):
        searching = search_seconds(decoder, source.tensors, threads)
    stream = stream_bytes(decoder, tokens)
    kept = sums_bytes(decoder, diagonal) + (stream if stream <= BUDGET_BYTES else 0)
    most = max((each.memory_bytes for each in solving), default=0)
    kept += runtime_bytes(decoder, window, threads)
    return replace(
        passing,
        memory_bytes=max(passing.memory_bytes, kept + most),
        seconds=passing.seconds + searching + sum(each.seconds for each in solving),
    )


def _is_product(role: str, shape: tuple[int, ...]) -> bool:
    return role.startswith("blk.") and role.endswith(".weight") and len(shape) >= 2
