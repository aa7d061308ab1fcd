"""Models small enough to be written by hand: numpy and a byte-level tokenizer only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

Tensors = dict[str, npt.NDArray[Any]]

DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "uint16": "BF16", "int32": "I32"}
"""uint16 stands for bfloat16, which numpy lacks."""

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def safetensors_bytes(tensors: Tensors) -> bytes:
    """A safetensors file, written by the format's definition and not by its library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        dtype = DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values())


def llama_tensors(seed: int = 0) -> Tensors:
    """Random float32 weights for ``CONFIG``, by their names in a checkpoint."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (300, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (32,),
            f"{prefix}.post_attention_layernorm.weight": (32,),
            f"{prefix}.self_attn.q_proj.weight": (32, 32),
            f"{prefix}.self_attn.k_proj.weight": (16, 32),
            f"{prefix}.self_attn.v_proj.weight": (16, 32),
            f"{prefix}.self_attn.o_proj.weight": (32, 32),
            f"{prefix}.mlp.gate_proj.weight": (48, 32),
            f"{prefix}.mlp.up_proj.weight": (48, 32),
            f"{prefix}.mlp.down_proj.weight": (32, 48),
        }
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def byte_tokenizer() -> str:
    """``tokenizer.json`` of a byte-level BPE with 256 bytes and one special token."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def to_safetensors() -> Callable[[Tensors], bytes]:
    return safetensors_bytes


@pytest.fixture
def tensors() -> Tensors:
    """Fresh weights of the tiny Llama, to be changed by a test."""
    return llama_tensors()


WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """``write_model(tensors, config changes..., shards=n)``: a Hugging Face folder."""

    def write(tensors: Tensors, *, shards: int = 1, folder: str = "model", **changes: Any) -> Path:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text(byte_tokenizer())
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        (path / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
        (path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [tiny]\n---\n# Tiny\n")
        if shards == 1:
            (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
            return path
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[shard::shards])
            (path / name).write_bytes(safetensors_bytes(part))
            weight_map |= dict.fromkeys(part, name)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (path / "model.safetensors.index.json").write_text(index)
        return path

    return write
