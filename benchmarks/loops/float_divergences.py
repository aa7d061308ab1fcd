"""How far quantized Hugging Face folders are from a model, their weights as the floats they mean.

Arguments: MODEL TOKENS.json FOLDER... Prints JSON by folder: mean KL divergence and its standard
error, how many weights are on which grid, and which matrices are floats. No rounding of activations
or of a runtime comes in between: only the weights differ.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from edgellm.evaluation import Comparison
from edgellm.forward import hidden_states, logits_of
from edgellm.quant.stored import codes_of
from edgellm.source import open_source
from edgellm.tensors import TensorRef


def grid_of(weight: TensorRef) -> str | None:
    """The grid that a matrix lies on, by its zeros and groups as they are written; None: floats."""
    stored = codes_of(weight)
    if stored is None:
        return None
    group = weight.columns // stored.scales(0, 1).shape[1]
    middle = 2 ** (stored.bits - 1)
    symmetric = stored.spread.least_zero == stored.spread.largest_zero == middle
    return f"int{stored.bits}-g{group}{'-sym' if symmetric else ''}"


model, tokens, *folders = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
source = open_source(model)
expected = hidden_states(source, windows)
answer = {}
for folder in folders:
    quantized, comparison = open_source(folder, quantized=True), Comparison()
    pairs = zip(windows, expected, hidden_states(quantized, windows), strict=True)
    for window, before, after in pairs:
        comparison.add(logits_of(source, before), logits_of(quantized, after), window)
    found = comparison.result()
    grids = {
        role: grid_of(weight)
        for role, weight in quantized.tensors.items()
        if len(weight.shape) == 2
    }
    answer[folder] = {
        "kl": found.kl,
        "kl_error": found.kl_error,
        "rounded": dict(Counter(grid for grid in grids.values() if grid)),
        "floats": sorted(role for role, grid in grids.items() if not grid),
    }
print(json.dumps(answer))
