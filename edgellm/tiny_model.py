"""A model drawn at random, as small as one can be that every runtime runs: for trying them out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm.export.to_safetensors import header_bytes
from edgellm.tensors import Array

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 160, 2, 4, 2, 32
CONTEXT_TOKENS = 512
BOS, EOS = "<s>", "</s>"
MERGES = (("t", "h"), ("th", "e"))
SEED = 20

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Stored:
    """A float32 tensor of a safetensors file."""

    name: str
    values: Array
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def write_tiny_model(folder: Path) -> Path:
    """Write config, safetensors and tokenizer into ``folder``, the same every time; returns it.

    A Llama of two layers whose logits reach about 10, with a vocabulary of bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab_size}, indent=1))
    tensors = _tensors(vocab_size)
    content = b"".join(np.ascontiguousarray(tensor.values).tobytes() for tensor in tensors)
    header = header_bytes(tensors, {"format": "pt"})
    (folder / "model.safetensors").write_bytes(header + content)
    return folder


def _write_tokenizer(folder: Path) -> int:
    """A byte-level BPE with hardly a merge; the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [BOS, EOS, *symbols, *(left + right for left, right in MERGES)]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return len(words)


def _tensors(vocab_size: int) -> list[Stored]:
    draw = np.random.default_rng(SEED)

    def matrix(name: str, rows: int, columns: int, size: float = 1.0) -> Stored:
        values = draw.standard_normal((rows, columns)) * size / columns**0.5
        return Stored(name, values.astype(np.float32))

    def norm(name: str) -> Stored:
        return Stored(name, (1 + 0.1 * draw.standard_normal(HIDDEN)).astype(np.float32))

    tensors = [matrix("model.embed_tokens.weight", vocab_size, HIDDEN, size=8.0)]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors += [
            norm(f"{prefix}.input_layernorm.weight"),
            matrix(f"{prefix}.self_attn.q_proj.weight", HEADS * HEAD_DIM, HIDDEN, size=2.0),
            matrix(f"{prefix}.self_attn.k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN, size=2.0),
            matrix(f"{prefix}.self_attn.v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN),
            matrix(f"{prefix}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM),
            norm(f"{prefix}.post_attention_layernorm.weight"),
            matrix(f"{prefix}.mlp.gate_proj.weight", FFN, HIDDEN, size=2.0),
            matrix(f"{prefix}.mlp.up_proj.weight", FFN, HIDDEN),
            matrix(f"{prefix}.mlp.down_proj.weight", HIDDEN, FFN),
        ]
    return [*tensors, norm("model.norm.weight"), matrix("lm_head.weight", vocab_size, HIDDEN, 3.0)]
