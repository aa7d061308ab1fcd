"""Quantize a model with llm-compressor on given windows of token ids, and write its folder.

Arguments: MODEL TOKENS.json OUT GROUP sym|affine gptq|awq. The model computes in float32; the
head stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, out, group, zeros, method = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]

if not torch.accelerator.is_available():
    # Pinning only makes copies to an accelerator quicker, and raises where there is none.
    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None

weights = QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=int(group), symmetric=zeros == "sym"
)
scheme = {
    "config_groups": {"linear": QuantizationScheme(targets=["Linear"], weights=weights)},
    "ignore": ["lm_head"],
}
recipe = {
    "gptq": lambda: [GPTQModifier(**scheme)],
    "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme)],
}[method]()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]


def batch(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Tensors of one batch."""
    return {name: torch.tensor([each[name] for each in chosen]) for name in chosen[0]}


oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=DataLoader(examples, batch_size=1, collate_fn=batch),
    recipe=recipe,
    num_calibration_samples=len(windows),
    max_seq_length=len(windows[0]),
)
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
