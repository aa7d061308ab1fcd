"""Tiny random models of the real transformers classes, saved as Hugging Face folders.

Each has a real, trained byte-level BPE tokenizer with a chat template. Weights are drawn so that
everything shows in the logits: norms are not one, biases not zero, attention not flat.

Use them through the session fixture ``tiny_model``: ``tiny_model("llama")`` builds a folder once.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import transformers

TEXT = """The quick brown fox jumps over the lazy dog. It's 2024, isn't it? We'll see: 3.14159!
Où est l'école? Straße, naïve café. 日本語のテキスト、中文文本。 Привет, мир! 🙂🚀
def add(a, b):\n    return a + b\n\n\tfor i in range(10):\n        print(i, "tab\\t")
<p>HTML &amp; entities</p> {"json": [1, 2, 3], "key": null}  double  spaces   triple
I have 12 apples and 345 oranges; 6789 people came on 10/11/2012.
A tokenizer splits a text into tokens, and a model turns the tokens into other tokens.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

# Pre-tokenizers as the model makers publish them, so that readers recognise the tokenizer.
SPLITS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@dataclass(frozen=True)
class Tiny:
    """A model to build: the class of its config, what it is given, and how text is split.

    ``old_style``: its config.json is rewritten as transformers 4 wrote it. ``seed`` of its weights;
    None for its place among those without one, which a new model must not change.
    """

    config_class: str
    settings: dict[str, Any]
    split: str = "gpt2"
    old_style: bool = False
    vocab_size: int = field(default=517, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)


_LLAMA: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_QWEN: dict[str, Any] = _LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3}
_QWEN2: dict[str, Any] = {
    **{key: value for key, value in _QWEN.items() if key != "head_dim"},
    "hidden_size": 192,
    "rms_norm_eps": 1e-6,
}
_GEMMA: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT2: dict[str, Any] = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}

_GEMMA1: dict[str, Any] = {
    key: value
    for key, value in _GEMMA.items()
    if key not in ("query_pre_attn_scalar", "sliding_window", "layer_types")
}
_SQUARE: dict[str, Any] = {
    **{key: value for key, value in _LLAMA.items() if key not in ("head_dim", "rms_norm_eps")},
    "hidden_size": 192,
}
"""Heads that together are as wide as the model, 32 each."""

_NEOX: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}

_MPT: dict[str, Any] = {"d_model": 192, "n_heads": 6, "n_layers": 3, "max_seq_len": 256}
_OPT: dict[str, Any] = {
    "hidden_size": 192,
    "ffn_dim": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
_GPTJ: dict[str, Any] = {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 128}
_FALCON: dict[str, Any] = {
    "hidden_size": 192,
    "ffn_hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}

_MINICPM3: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
}
_DEEPSEEK: dict[str, Any] = _MINICPM3 | {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 96,
    "v_head_dim": 32,
    "qk_rope_head_dim": 8,
    "first_k_dense_replace": 3,
}
"""Latent attention without a mixture of experts."""

_DEEPSEEK_EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
}

_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 160}
_GRANITE_EXPERTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "intermediate_size": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
    "logits_scaling": 3.0,
}
_LFM2: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "block_multiple_of": 24,
    "block_ffn_dim_multiplier": 1.3,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
}

_MAMBA: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "state_size": 12}

MODELS: dict[str, Tiny] = {
    # Llama: three query heads to a kv head, heads wider than the model together, untied.
    "llama": Tiny(
        "LlamaConfig",
        _LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama3",
    ),
    "llama-biased": Tiny(
        "LlamaConfig",
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": Tiny(
        "LlamaConfig",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        old_style=True,
    ),
    "llama-yarn": Tiny(
        "LlamaConfig",
        _LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    # Everything of yarn that llama.cpp's keys cannot say.
    "llama-yarn-odd": Tiny(
        "LlamaConfig",
        _LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "truncate": False,
            }
        },
    ),
    # Rows that blocks of 256 divide, for the grids that need them.
    "llama-256": Tiny(
        "LlamaConfig",
        _LLAMA
        | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 64,
        },
        "llama3",
    ),
    # Mistral: a window in every layer, and a hidden size that five heads do not divide.
    "mistral": Tiny(
        "MistralConfig",
        _LLAMA
        | {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "llama3",
    ),
    "mistral-no-window": Tiny(
        "MistralConfig", _LLAMA | {"sliding_window": None, "tie_word_embeddings": True}
    ),
    "qwen2": Tiny(
        "Qwen2Config",
        _QWEN2
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "qwen2",
        old_style=True,
    ),
    "qwen2-window": Tiny(
        "Qwen2Config",
        _QWEN2
        | {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.3,
            },
        },
        "qwen2",
    ),
    "qwen3": Tiny(
        "Qwen3Config",
        _QWEN | {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "qwen2",
    ),
    "qwen3-biased": Tiny(
        "Qwen3Config", _QWEN | {"attention_bias": True, "tie_word_embeddings": True}, "qwen2"
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        _GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    # As Gemma 3 was first published: every sixth layer global, keys of the old style.
    "gemma3-pattern": Tiny(
        "Gemma3TextConfig",
        {key: value for key, value in _GEMMA.items() if key != "layer_types"}
        | {"num_hidden_layers": 7, "sliding_window_pattern": 6, "tie_word_embeddings": False},
        old_style=True,
    ),
    # An attention scale that is not the head's, which llama.cpp's graph fixes.
    "gemma3-scale": Tiny("Gemma3TextConfig", _GEMMA | {"query_pre_attn_scalar": 24}),
    "gemma": Tiny("GemmaConfig", _GEMMA1 | {"hidden_act": "gelu_pytorch_tanh"}, seed=0),
    # Soft caps low enough to be felt.
    "gemma2": Tiny(
        "Gemma2Config",
        _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
        seed=1,
    ),
    "granite": Tiny(
        "GraniteConfig",
        _SQUARE
        | {
            "rms_norm_eps": 1e-5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.25,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
        seed=7,
    ),
    "olmo": Tiny("OlmoConfig", _SQUARE | {"clip_qkv": 0.8}, seed=16),
    "olmo2": Tiny("Olmo2Config", _SQUARE | {"rms_norm_eps": 1e-5}, seed=17),
    "olmo3": Tiny(
        "Olmo3Config",
        _SQUARE
        | {
            "rms_norm_eps": 1e-5,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            },
        },
        seed=18,
    ),
    "smollm3": Tiny(
        "SmolLM3Config",
        _SQUARE | {"rms_norm_eps": 1e-6, "num_hidden_layers": 5},
        "llama3",
        seed=26,
    ),
    "starcoder2": Tiny(
        "Starcoder2Config",
        _SQUARE | {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None},
        seed=30,
    ),
    "starcoder2-window": Tiny(
        "Starcoder2Config",
        _SQUARE
        | {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 8, "tie_word_embeddings": False},
        seed=31,
    ),
    "stablelm": Tiny(
        "StableLmConfig",
        _SQUARE
        | {
            "use_qkv_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
        seed=27,
    ),
    # A quarter of a head of 64, and of one of 32, which onnxruntime's attention does not turn.
    "stablelm-parallel": Tiny(
        "StableLmConfig",
        _SQUARE
        | {"num_attention_heads": 3, "num_key_value_heads": 1}
        | {"use_parallel_residual": True},
        seed=29,
    ),
    "stablelm-eighth": Tiny("StableLmConfig", _SQUARE, seed=28),
    # As StableLM 2 12B is: heads normed each with their own weights, one norm for both halves.
    "stablelm-normed": Tiny(
        "StableLmConfig", _SQUARE | {"qk_layernorm": True, "use_parallel_residual": True}, seed=210
    ),
    "phi": Tiny(
        "PhiConfig", _SQUARE | {"hidden_act": "gelu_new", "num_key_value_heads": 6}, seed=19
    ),
    "phi3": Tiny(
        "Phi3Config",
        _SQUARE | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 256},
        seed=20,
    ),
    # Factors for texts within the trained length, which its context is capped at.
    "phi3-longrope": Tiny(
        "Phi3Config",
        _SQUARE
        | {
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0 + 0.05 * n for n in range(8)],
                "long_factor": [1.0 + 0.9 * n for n in range(8)],
            },
            "tie_word_embeddings": True,
        },
        seed=21,
    ),
    # Mixtures of experts: counts that are no power of two, experts narrower than the model.
    "mixtral": Tiny(
        "MixtralConfig",
        _LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
        "llama3",
        seed=201,
    ),
    "qwen2_moe": Tiny("Qwen2MoeConfig", _QWEN2 | _QWEN_EXPERTS | _SHARED, "qwen2", seed=202),
    # What llama.cpp's graph cannot: weights that sum to one, a layer without experts.
    "qwen2_moe-dense": Tiny(
        "Qwen2MoeConfig",
        _QWEN2 | _QWEN_EXPERTS | _SHARED | {"norm_topk_prob": True, "mlp_only_layers": [1]},
        "qwen2",
        seed=203,
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig",
        _QWEN | _QWEN_EXPERTS | {"norm_topk_prob": True, "num_experts": 7},
        "qwen2",
        seed=204,
    ),
    "qwen3_moe-dense": Tiny(
        "Qwen3MoeConfig",
        _QWEN | _QWEN_EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        "qwen2",
        seed=205,
    ),
    "olmoe": Tiny(
        "OlmoeConfig",
        _SQUARE
        | {
            "num_key_value_heads": 6,
            "rms_norm_eps": 1e-5,
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "intermediate_size": 64,
        },
        seed=206,
    ),
    "granitemoe": Tiny(
        "GraniteMoeConfig", _SQUARE | _GRANITE_EXPERTS | {"tie_word_embeddings": True}, seed=207
    ),
    "granitemoeshared": Tiny(
        "GraniteMoeSharedConfig",
        _SQUARE | _GRANITE_EXPERTS | {"shared_intermediate_size": 96},
        seed=208,
    ),
    # Heads that are no power of two, whose slopes come in two series.
    "bloom": Tiny("BloomConfig", {"hidden_size": 192, "n_layer": 3, "n_head": 6}, seed=107),
    "mpt": Tiny("MptConfig", _MPT | {"attn_config": {"clip_qkv": 1.5}}, seed=108),
    "mpt-scale": Tiny(
        "MptConfig",
        _MPT | {"n_heads": 4, "tie_word_embeddings": False, "attn_config": {"softmax_scale": 0.1}},
        seed=109,
    ),
    "opt": Tiny("OPTConfig", _OPT, seed=110),
    "opt-bare": Tiny(
        "OPTConfig",
        _OPT
        | {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
        seed=111,
    ),
    "gptj": Tiny("GPTJConfig", _GPTJ | {"rotary_dim": 16}, seed=112),
    "gptj-eighth": Tiny("GPTJConfig", _GPTJ | {"rotary_dim": 8, "n_inner": 160}, seed=113),
    "falcon": Tiny(
        "FalconConfig",
        _FALCON
        | {
            "activation": "gelu_new",
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
        },
        seed=103,
    ),
    "falcon-grouped": Tiny(
        "FalconConfig",
        _FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
        seed=104,
    ),
    "falcon-grouped-one-norm": Tiny(
        "FalconConfig",
        _FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
        seed=105,
    ),
    # As many heads as make slopes, and their products with places, that bf16 holds exactly.
    "falcon-alibi": Tiny(
        "FalconConfig",
        _FALCON
        | {
            "num_attention_heads": 8,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
        seed=106,
    ),
    # A third of a head of 48, which onnxruntime's attention turns, and a quarter of one of 32,
    # which it does not.
    "gpt_neox": Tiny(
        "GPTNeoXConfig",
        _NEOX
        | {
            "num_attention_heads": 4,
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 2e4,
                "partial_rotary_factor": 1 / 3,
            },
        },
        seed=101,
    ),
    "gpt_neox-sequential": Tiny(
        "GPTNeoXConfig",
        _NEOX | {"use_parallel_residual": False},
        seed=102,
    ),
    # Latent attention: keys of 32 and 16 values, values of 64, so that heads together are wider
    # than the model; queries out of a smaller vector.
    "minicpm3": Tiny("MiniCPM3Config", _MINICPM3 | {"tie_word_embeddings": False}, seed=201),
    # Everything that llama.cpp's graph has other numbers for in its code, and a latent that does
    # not fill what onnxruntime's attention takes.
    "minicpm3-plain": Tiny(
        "MiniCPM3Config",
        _MINICPM3
        | {
            "q_lora_rank": None,
            "kv_lora_rank": 36,
            "qk_rope_head_dim": 8,
            "scale_emb": 3,
            "scale_depth": None,
            "dim_model_base": 96,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
        seed=202,
    ),
    "minicpm3-longrope": Tiny(
        "MiniCPM3Config",
        _MINICPM3
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0 + 0.2 * n for n in range(8)],
                "long_factor": [1.0 + 0.2 * n for n in range(8)],
            },
            "tie_word_embeddings": False,
        },
        seed=203,
    ),
    "deepseek_v2": Tiny("DeepseekV2Config", _DEEPSEEK, seed=204),
    # Yarn whose two factors differ, and queries made at once.
    "deepseek_v2-lite": Tiny(
        "DeepseekV2Config",
        _DEEPSEEK
        | {
            "q_lora_rank": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.3,
                "mscale_all_dim": 0.7,
            },
        },
        "llama3",
        old_style=True,
        seed=205,
    ),
    # A dense layer, then mixtures; experts of the best groups, which llama.cpp ranks otherwise.
    "deepseek_v2-experts": Tiny(
        "DeepseekV2Config",
        _DEEPSEEK | _DEEPSEEK_EXPERTS | {"topk_method": "greedy", "routed_scaling_factor": 1.7},
        seed=207,
    ),
    "deepseek_v2-groups": Tiny(
        "DeepseekV2Config",
        _DEEPSEEK
        | _DEEPSEEK_EXPERTS
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        seed=208,
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3Config",
        _DEEPSEEK
        | _DEEPSEEK_EXPERTS
        | {
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        seed=209,
    ),
    # Widths of 24 by 24 above two thirds of what is stated, times a factor: 192.
    "lfm2": Tiny("Lfm2Config", _LFM2, seed=201),
    "lfm2-untied": Tiny(
        "Lfm2Config",
        _LFM2
        | {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 192,
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention", "conv", "full_attention", "conv", "conv"],
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 4.0},
        },
        seed=202,
    ),
    "lfm2-biased": Tiny("Lfm2Config", _LFM2 | {"conv_bias": True, "conv_L_cache": 2}, seed=203),
    "mamba": Tiny("MambaConfig", _MAMBA, seed=204),
    "mamba-biased": Tiny(
        "MambaConfig",
        _MAMBA
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "expand": 3,
            "conv_kernel": 3,
            "time_step_rank": 5,
            "tie_word_embeddings": False,
        },
        seed=209,
    ),
    # Three heads to a group, which share what leads into their states.
    "mamba2": Tiny(
        "Mamba2Config", _MAMBA | {"num_heads": 6, "head_dim": 32, "n_groups": 2}, seed=208
    ),
    "mamba2-tied": Tiny(
        "Mamba2Config",
        _MAMBA
        | {
            "num_heads": 9,
            "head_dim": 32,
            "expand": 3,
            "n_groups": 1,
            "conv_kernel": 2,
            "tie_word_embeddings": True,
        },
        seed=207,
    ),
    "cohere": Tiny("CohereConfig", _SQUARE | {"logit_scale": 0.4}),
    # Command R+: as many layers as llama.cpp looks for norms of heads in.
    "cohere-normed": Tiny(
        "CohereConfig",
        _SQUARE
        | {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "logit_scale": 1.5,
        },
        seed=206,
    ),
    "gpt2": Tiny("GPT2Config", _GPT2),
    "gpt2-untied": Tiny(
        "GPT2Config",
        _GPT2
        | {
            "n_inner": 160,
            "activation_function": "gelu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
}


FIRST = (
    "gemma3",
    "gemma3-pattern",
    "gemma3-scale",
    "gpt2",
    "gpt2-untied",
    "llama",
    "llama-256",
    "llama-biased",
    "llama-linear",
    "llama-yarn",
    "llama-yarn-odd",
    "mistral",
    "mistral-no-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-biased",
)
"""Models whose weights were drawn by their place in this list, which bounds in tests are of."""


def seed_of(name: str) -> int:
    """What the weights of ``name`` are drawn by, whatever other models there are."""
    return FIRST.index(name) if name in FIRST else zlib.crc32(name.encode())


def model_type_of(tiny: Tiny) -> str:
    """The ``model_type`` of its config class."""
    import transformers

    found: str = getattr(transformers, tiny.config_class).model_type
    return found


def build(name: str, folder: Path) -> Path:
    """Save the model ``name`` of ``MODELS`` into ``folder``: config, safetensors, tokenizer."""
    import torch
    import transformers

    tiny = MODELS[name]
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
    config = getattr(transformers, tiny.config_class)(
        vocab_size=tiny.vocab_size, **special, **tiny.settings
    )
    with quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model, seed=seed_of(name) if tiny.seed is None else tiny.seed)
    model.save_pretrained(folder)
    if tiny.old_style:
        path = folder / "config.json"
        path.write_text(json.dumps(as_transformers_4(json.loads(path.read_text())), indent=1))
    save_tokenizer(tiny.split, tiny.vocab_size, folder)
    return folder


def randomize(model: transformers.PreTrainedModel, seed: int) -> None:
    """Draw all weights so that no part of the network is without effect on the logits."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1 and "norm" not in name and ".ln_" not in name:
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                centre = 1.0 if parameter.mean() > 0.5 else 0.0
                parameter.copy_(centre + 0.3 * noise)
            elif parameter is head.weight or parameter is table.weight:
                parameter.copy_(0.3 * noise)
            else:
                # Products of a Conv1D are stored [in, out]: sizes are close enough for a test.
                parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys of the years before ``rope_parameters`` and ``layer_types``."""
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config.pop("layer_types")
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    if config["model_type"].startswith("qwen"):
        config.pop("layer_types")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    return config


def save_tokenizer(split: str, vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on ``TEXT`` and save it as transformers does.

    It has a few ids less than ``vocab_size``, as real models do.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    if split == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 5,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    bos, _, eos, pad = SPECIAL_TOKENS
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def load(folder: Path) -> transformers.PreTrainedModel:
    """The model of ``folder`` as transformers reads it, in float32 and with eager attention."""
    import torch
    import transformers

    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_attention_of(folder)
        )
    return model.eval()


def _attention_of(folder: Path) -> str:
    """Eager where it is right: Falcon's adds ALiBi twice."""
    config = json.loads((folder / "config.json").read_text())
    alibi = config["model_type"] == "falcon" and config["alibi"]
    return "sdpa" if alibi else "eager"


def reference_logits(folder: Path, token_ids: list[int]) -> np.ndarray:
    """transformers' logits ``[tokens, vocab]`` for ``token_ids``, float32, without a cache."""
    import torch

    with torch.no_grad():
        out = load(folder)(torch.tensor([token_ids]), use_cache=False)
    logits: np.ndarray = out.logits[0].numpy()
    return logits


def some_token_ids(count: int, vocab_size: int = 500, seed: int = 1) -> list[int]:
    """``count`` token ids to feed a model with, special tokens left out."""
    draw = np.random.default_rng(seed)
    return [int(token) for token in draw.integers(len(SPECIAL_TOKENS), vocab_size, count)]


def builder(root: Path) -> Callable[[str], Path]:
    """``build`` that keeps what it has built below ``root``. Nobody may change those folders."""
    built: dict[str, Path] = {}

    def tiny_model(name: str) -> Path:
        if name not in built:
            built[name] = build(name, root / name)
        return built[name]

    return tiny_model


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a built model that a test may damage."""
    return Path(shutil.copytree(folder, to))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar and its advice."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
