"""Quantize a model with gptqmodel's GPTQ on given windows of token ids, and write its folder.

Arguments: MODEL TOKENS.json OUT GROUP sym|affine desc_act|static.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig

model, tokens, out, group, zeros, order = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
config = QuantizeConfig(
    bits=4, group_size=int(group), sym=zeros == "sym", desc_act=order == "desc_act"
)
loaded = GPTQModel.load(model, config, device="cpu", dtype=torch.float32)
examples = [
    {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones((1, len(ids)), dtype=torch.long),
    }
    for ids in windows
]
loaded.quantize(examples, batch_size=1)
loaded.save(out)
