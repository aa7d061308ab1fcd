"""How far quantized Hugging Face folders are from a model, their weights as the floats they mean.

Arguments: MODEL TOKENS.json FOLDER... Prints JSON: mean KL divergence and its standard error by
folder. No rounding of activations or of a runtime comes in between: only the weights differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgellm.evaluation import Comparison
from edgellm.forward import hidden_states, logits_of
from edgellm.source import open_source

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
    answer[folder] = {"kl": found.kl, "kl_error": found.kl_error}
print(json.dumps(answer))
