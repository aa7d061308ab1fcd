"""Log-probabilities of the unquantized model on the held-out windows, by transformers in float32.

Arguments: FOLDER TOKENS.json OUT.npy (float32 ``[windows, tokens, vocabulary]``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, tokens, out = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.train(False)
shape = (len(windows), len(windows[0]), model.config.vocab_size)
kept = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
with torch.inference_mode():
    for row, window in zip(kept, windows, strict=True):
        logits = model(torch.tensor([window]), use_cache=False).logits[0]
        row[:] = torch.log_softmax(logits, dim=-1).numpy()
kept.flush()
