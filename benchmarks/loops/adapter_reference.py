"""Log-probabilities of a base with an adapter beside it, by PEFT in float32, on held-out windows.

Arguments: FOLDER ADAPTER TOKENS.json OUT.npy (float32 ``[windows, tokens, vocabulary]``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, adapter, tokens, out = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
vocabulary = base.config.vocab_size
model = PeftModel.from_pretrained(base, adapter)
model.train(False)
shape = (len(windows), len(windows[0]), vocabulary)
kept = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
with torch.inference_mode():
    for row, window in zip(kept, windows, strict=True):
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
        row[:] = torch.log_softmax(logits, dim=-1).numpy()
kept.flush()
