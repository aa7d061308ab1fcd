"""Quantize a model with auto-round on given windows of token ids, and write its folder.

Arguments: MODEL TOKENS.json OUT GROUP sym|affine ITERATIONS. Batches of 8 windows, the library's
default; the model computes in float32. The layout is the one that the library advises: GPTQ's for
symmetric weights, AWQ's for affine ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, out, group, zeros, iterations = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
# Its padding token ends every turn of a chat, and would be masked out of the calibration.
tokenizer.pad_token = None
rounding = AutoRound(
    model,
    tokenizer,
    scheme="W4A16",
    group_size=int(group),
    sym=zeros == "sym",
    iters=int(iterations),
    dataset=[torch.tensor([ids]) for ids in windows],
    seqlen=len(windows[0]),
    nsamples=len(windows),
    device_map="cpu",
    amp=False,
    enable_torch_compile=False,
)
partial = Path(f"{out}.partial")
rounding.quantize_and_save(str(partial), format="auto_gptq" if zeros == "sym" else "auto_awq")
(made,) = partial.iterdir()  # a folder that it names itself
made.rename(out)
partial.rmdir()
