"""GGUF adapters written by gguf-py, as llama.cpp's own converter makes them and broken ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellm.source.gguf_file import read_gguf
from edgellm.source.gguf_model import references

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of a Llama's products, from its ``tensor_mapping.py``."""


def write_adapter(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    arch: str = "llama",
    alpha: float | None = 8.0,
    kind: str = "adapter",
    adapter_type: str = "lora",
    **keys: Any,
) -> Path:
    """A GGUF file with these tensors under these names, whatever they are worth."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", adapter_type)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in keys.items():
        name = key.replace("__", ".")
        writer.add_array(name, value) if isinstance(value, list) else writer.add_string(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(role: str, out: int, into: int, *, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Random factors of one weight ``[out, into]``, under llama.cpp's names."""
    draw = np.random.default_rng(seed)
    return {
        f"{role}.lora_a": draw.standard_normal((rank, into)).astype(np.float32) * 0.1,
        f"{role}.lora_b": draw.standard_normal((out, rank)).astype(np.float32) * 0.1,
    }


def as_llamacpp_converts(folder: Path, path: Path, *, heads: int, kv_heads: int) -> Path:
    """A PEFT LoRA of a Llama's products as ``convert_lora_to_gguf.py`` writes it.

    It takes ``lora_alpha`` and nothing else of the config, and turns the rows of q and k by
    ``LlamaModel.permute``.
    """
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {}
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        _, _, _, _, layer, block, module, part, _ = name.split(".")
        role = MODULES[f"{block}.{module}"]
        if part == "lora_B" and role in ("attn_q", "attn_k"):
            count = heads if role == "attn_q" else kv_heads
            halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[f"blk.{layer}.{role}.weight.{part.lower()}"] = values
    return write_adapter(path, tensors, alpha=float(config["lora_alpha"]))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a GGUF file, as it stores them."""
    stored = read_gguf(path)
    return stored.metadata, {name: ref.load() for name, ref in references(stored).items()}


def products(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each weight: ``alpha / rank * B @ A``, in float64, rows as stored."""
    metadata, tensors = contents(path)
    alpha = metadata["adapter.lora.alpha"]
    found = {}
    for name, b in tensors.items():
        if not name.endswith(".lora_b"):
            continue
        role = name.removesuffix(".lora_b")
        a = tensors[f"{role}.lora_a"].astype(np.float64)
        first, second = (a, b.T) if role == "token_embd.weight" else (b, a)
        found[role] = alpha / b.shape[1] * first.astype(np.float64) @ second.astype(np.float64)
    return found
