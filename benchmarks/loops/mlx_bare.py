"""Prefill and greedy decode through mlx-lm's own generator, one round for each line on stdin.

Arguments: FOLDER TOKENS.json THREADS NEW_TOKENS; MLX has its own number of threads. The prompt's
tokens but the last are its prefill, and the first new token ends it. On a CPU in float32, as
edgellm computes there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

folder, tokens, _, new_tokens = sys.argv[1:]
prompt = mx.array(json.loads(Path(tokens).read_text())["prompt"])
count = int(new_tokens)
model, _ = load_model(Path(folder))
if not mx.metal.is_available():
    mx.set_default_device(mx.cpu)
    model.set_dtype(mx.float32)
print(json.dumps({"device": str(mx.default_device())}), flush=True)

for _ in sys.stdin:
    started = time.perf_counter()
    produced = []
    for token, _ in generate_step(prompt, model, max_tokens=count + 1):
        produced.append(int(token))
        if len(produced) == 1:
            prefilled = time.perf_counter()
    ended = time.perf_counter()
    answer = {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }
    print(json.dumps(answer), flush=True)
