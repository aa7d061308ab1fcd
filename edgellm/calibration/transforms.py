"""The transforms and the split that a recipe names, put before its solver."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from edgellm import registry
from edgellm.calibration.folding import Folding, folded_source
from edgellm.calibration.splitting import Splitting, split_source
from edgellm.errors import UsageError
from edgellm.quant import SOLVERS, SPLITS, TRANSFORMS
from edgellm.quant.grid import Grid
from edgellm.quant.smoothquant import ROUNDED
from edgellm.source.model import ModelSource


def plan_transforms(
    source: ModelSource, names: Sequence[str], grids: Mapping[str, Grid], solver: str
) -> tuple[ModelSource, Folding | Splitting | None]:
    """``source`` with its tensors changed by what ``names`` will find, and what finds it.

    ``grids`` are those of the linear layers by role, ``solver`` is what rounds them. Without names,
    ``source`` and None. Raises ``UsageError`` for two transforms, which would both choose the same
    factors, for a split that does not come last, and for what has nothing to do on the grids.
    """
    scaling = [name for name in names if name in TRANSFORMS]
    splits = [name for name in names if name in SPLITS]
    if len(scaling) > 1:
        raise UsageError(
            f"{' and '.join(scaling)} both choose the scale of each input channel: name one "
            f"(--quant {scaling[0]}:GRID)"
        )
    if list(names) != scaling + splits:
        raise UsageError(
            f"{splits[0]} looks at inputs as {scaling[0]} leaves them: write "
            f"{scaling[0]}+{splits[0]}"
        )
    for name in names:
        check_useful(name, set(grids.values()))
    folding = None
    if scaling:
        search = registry.attribute(TRANSFORMS[scaling[0]])
        corrected = SOLVERS[solver].needs == "hessian"
        source, folding = folded_source(source, search, corrected=corrected)
        source = replace(source, scaled_by=(*source.scaled_by, *scaling))
    if not splits:
        return source, folding
    _check_head(source, splits[0], grids)
    choose = registry.attribute(SPLITS[splits[0]])
    return split_source(source, choose, grids, folding)


def check_useful(name: str, grids: Collection[Grid]) -> None:
    """Raise ``UsageError`` where ``name`` can gain nothing on any of ``grids``."""
    if all(grid.kind == "float" for grid in grids):
        raise UsageError(f"{name} prepares weights for rounding, and these stay floats")
    if name == "awq" or any(grid.kind == ROUNDED for grid in grids):
        return
    names = ", ".join(sorted({grid.name for grid in grids}))
    if name in SPLITS:
        raise UsageError(
            f"{name} keeps the largest activations out of the rounding of the others, which have "
            f"one scale with int8-dynamic alone: leave it out of {names}, or choose --format onnx "
            f"--quant {name}:int8-dynamic"
        )
    raise UsageError(
        f"{name} eases the rounding of activations, which {names} does not round: choose "
        f"int8-dynamic, or awq:{names}"
    )


def _check_head(source: ModelSource, name: str, grids: Mapping[str, Grid]) -> None:
    head = grids.get("token_embd.weight")
    if source.decoder.tied_head and head is not None and head.kind == ROUNDED:
        raise UsageError(
            f"--head {head.name}: {name} cuts weights along their inputs, and this head is the "
            "embedding, whose rows are looked up whole: choose --head int8"
        )
