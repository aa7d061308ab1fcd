"""GGUF files of architectures that edgellm does not make, with random weights, for llama.cpp.

Names and keys are llama.cpp's (its models/deepseek2.cpp and models/gemma4.cpp).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, HEADS, FEED_FORWARD = 64, 4, 96
CONTEXT = 512


def write_deepseek2(path: Path, vocabulary: Path) -> Path:
    """Keys and values as one latent vector (MLA), shared by all heads; the layers are dense."""
    layers, latent, query, rope, plain, value = 2, 48, 32, 16, 24, 32
    keys: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": plain + rope,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": query,
        "rope.dimension_count": rope,
        "leading_dense_block_count": layers,
        "expert_feed_forward_length": 0,
        "expert_shared_count": 0,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        blk = f"blk.{layer}"
        shapes |= _norms(blk, "attn_norm", "ffn_norm") | _feed_forward(blk)
        shapes |= {
            f"{blk}.attn_q_a_norm.weight": (query,),
            f"{blk}.attn_kv_a_norm.weight": (latent,),
            f"{blk}.attn_q_a.weight": (query, WIDTH),
            f"{blk}.attn_q_b.weight": (HEADS * (plain + rope), query),
            f"{blk}.attn_kv_a_mqa.weight": (latent + rope, WIDTH),
            f"{blk}.attn_k_b.weight": (HEADS, latent, plain),
            f"{blk}.attn_v_b.weight": (HEADS, value, latent),
            f"{blk}.attn_output.weight": (WIDTH, HEADS * value),
        }
    return _write(path, vocabulary, "deepseek2", layers, keys, shapes)


def write_gemma4(path: Path, vocabulary: Path) -> Path:
    """Narrow heads within windows, wide ones without; the last two layers look at earlier keys."""
    windows = [True, True, True, False, True, False]
    own, wide, narrow, kv_heads = 4, 32, 16, 2
    keys: dict[str, Any] = {
        "attention.head_count_kv": kv_heads,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": windows,
        "attention.shared_kv_layers": len(windows) - own,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": narrow,
        "embedding_length_per_layer_input": 0,
    }
    shapes: dict[str, tuple[int, ...]] = {"rope_freqs.weight": (wide // 2,)}
    for layer, window in enumerate(windows):
        blk, head = f"blk.{layer}", narrow if window else wide
        shapes |= _norms(blk, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        shapes |= _feed_forward(blk)
        shapes |= {
            f"{blk}.attn_q.weight": (HEADS * head, WIDTH),
            f"{blk}.attn_q_norm.weight": (head,),
            f"{blk}.attn_output.weight": (WIDTH, HEADS * head),
        }
        if layer < own:
            shapes |= {
                f"{blk}.attn_k.weight": (kv_heads * head, WIDTH),
                f"{blk}.attn_v.weight": (kv_heads * head, WIDTH),
                f"{blk}.attn_k_norm.weight": (head,),
            }
    return _write(path, vocabulary, "gemma4", len(windows), keys, shapes)


def _norms(blk: str, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{blk}.{name}.weight": (WIDTH,) for name in names}


def _feed_forward(blk: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{blk}.ffn_gate.weight": (FEED_FORWARD, WIDTH),
        f"{blk}.ffn_up.weight": (FEED_FORWARD, WIDTH),
        f"{blk}.ffn_down.weight": (WIDTH, FEED_FORWARD),
    }


def _write(
    path: Path,
    vocabulary: Path,
    arch: str,
    layers: int,
    keys: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> Path:
    """Write random matrices and vectors of ones, with the tokenizer of ``vocabulary``."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "block_count": layers,
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | keys
    for name, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{name}", value)
        else:
            writer.add_uint32(f"{arch}.{name}", value)
    reader = gguf.GGUFReader(vocabulary)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
    tokens = len(reader.fields["tokenizer.ggml.tokens"].contents())
    random = np.random.default_rng(1)
    shapes = {"token_embd.weight": (tokens, WIDTH), "output_norm.weight": (WIDTH,)} | shapes
    for name, shape in shapes.items():
        weight = np.ones(shape) if len(shape) == 1 else 0.1 * random.standard_normal(shape)
        writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
