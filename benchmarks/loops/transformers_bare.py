"""Prefill and greedy decode through transformers' ``generate``, one round for each line on stdin.

Arguments: FOLDER TOKENS.json THREADS NEW_TOKENS. Float32 on the CPU, as edgellm computes there. No
token ends the text, so that every round decodes as many.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers

folder, tokens, threads, new_tokens = sys.argv[1:]
prompt = torch.tensor([json.loads(Path(tokens).read_text())["prompt"]])
count = int(new_tokens)
torch.set_num_threads(int(threads))
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
print(json.dumps({"device": str(model.device)}), flush=True)


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when each token comes; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


for _ in sys.stdin:
    clock = Clock()
    started = time.perf_counter()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count + 1,
        max_new_tokens=count + 1,
        streamer=clock,
    )
    first, last = clock.times[1], clock.times[-1]
    answer = {
        "prefill_tokens_per_s": prompt.shape[1] / (first - started),
        "decode_tokens_per_s": count / (last - first),
        "tokens": found[0, prompt.shape[1] :].tolist(),
    }
    print(json.dumps(answer), flush=True)
