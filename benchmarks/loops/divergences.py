"""How far GGUF files' answers in llama.cpp are from the unquantized model's, on held-out windows.

Arguments: MODEL TOKENS.json FILE.gguf... Prints JSON: the figures of ``edgellm eval`` by file.
The float network is computed once up to its head. Files are opened one after the other: the waiting
threads of several llama.cpp contexts would take the cores from each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from edgellm.artifact import open_artifact
from edgellm.evaluation import Comparison
from edgellm.forward import hidden_states, logits_of
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import RunOptions
from edgellm.source import open_source

model, tokens, *files = sys.argv[1:]
source = open_source(model)
windows = json.loads(Path(tokens).read_text())["windows"]
options = RunOptions(context_tokens=max(map(len, windows)))
states = hidden_states(source, windows)
found = {}
for file in files:
    comparison = found[file] = Comparison()
    session = runtime_named("llamacpp").open(open_artifact(Path(file)), options)
    for window, hidden in zip(windows, states, strict=True):
        session.trim(0)
        logits = session.prefill(window, all_logits=True)
        comparison.add(logits_of(source, hidden), logits, window)
    session.close()
text = "".join(map(source.tokenizer.decode, windows))
words, nbytes = len(text.split()), len(text.encode())
figures = {file: msgspec.to_builtins(each.figures(words, nbytes)) for file, each in found.items()}
print(json.dumps(figures))
