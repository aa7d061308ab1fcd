"""How far GGUF files' answers in llama.cpp are from the unquantized model's, on held-out windows.

Arguments: MODEL TOKENS.json FILE.gguf... Prints JSON: the figures of ``edgellm eval`` by file.
The float network is computed once, and each window's logits are forgotten when all were compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from edgellm.evaluation import Comparison
from edgellm.forward import hidden_states, logits_of
from edgellm.manifest import open_artifact
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import RunOptions
from edgellm.source import open_source

model, tokens, *files = sys.argv[1:]
source = open_source(model)
windows = json.loads(Path(tokens).read_text())["windows"]
options = RunOptions(context_tokens=max(map(len, windows)))
sessions = {
    file: runtime_named("llamacpp").open(open_artifact(Path(file)), options) for file in files
}
found = {file: Comparison() for file in files}
for window, hidden in zip(windows, hidden_states(source, windows), strict=True):
    reference = logits_of(source, hidden)
    for file, session in sessions.items():
        session.trim(0)
        found[file].add(reference, session.prefill(window, all_logits=True), window)
text = "".join(map(source.tokenizer.decode, windows))
words, nbytes = len(text.split()), len(text.encode())
figures = {file: msgspec.to_builtins(each.figures(words, nbytes)) for file, each in found.items()}
print(json.dumps(figures))
