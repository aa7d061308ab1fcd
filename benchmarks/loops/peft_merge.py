"""Merge an adapter with PEFT and save the model: `python peft_merge.py BASE ADAPTER OUT`.

What is written is brought to the disk, as edgellm does it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(base: str, adapter: str, out: str) -> None:
    """Load in the base's own dtype, merge, save as safetensors with the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, low_cpu_mem_usage=True)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    for file in Path(out).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
