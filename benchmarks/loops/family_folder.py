"""A model of random weights of one family as a Hugging Face folder, in about a 100M one's shape.

Arguments: MODEL_TYPE FOLDER TOKENIZER_FOLDER, whose tokenizer it gets.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import transformers

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 768, 2048, 12, 12, 4, 49152, 2048
EXPERTS, USED = 8, 2

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), FFN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    "head_dim": HIDDEN // HEADS,
    "tie_word_embeddings": True,
    "block_auto_adjust_ff_dim": False,
    "query_pre_attn_scalar": HIDDEN // HEADS,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), FFN // EXPERTS),
    "shared_intermediate_size": FFN // EXPERTS,
    "num_experts_per_tok": USED,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": HIDDEN // 2,
    "kv_lora_rank": HIDDEN // 3,
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), HIDDEN // HEADS),
    "qk_rope_head_dim": HIDDEN // HEADS // 2,
    "rotary_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
}
"""By the names that config classes have for them. An embedding is a third of the weights."""

UNTIED = ("gpt_neox", "olmo2", "olmo3", "olmoe", "phi", "qwen2_moe", "stablelm")
"""Families whose heads llama.cpp's graphs have apart: half of their layers are as large as that."""

model_type, folder, tokenizer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
names = transformers.AutoConfig.for_model(model_type).to_dict()
ours = {name: size for name, size in SIZES.items() if name in names}
if names.keys() & {"num_experts", "num_local_experts"} and "moe_intermediate_size" not in names:
    ours["intermediate_size"] = FFN // EXPERTS  # an expert's
if model_type in ("falcon", "starcoder2"):  # gate and up in one
    ours["intermediate_size" if model_type == "starcoder2" else "ffn_hidden_size"] = 3 * FFN // 2
if model_type in UNTIED:
    ours["tie_word_embeddings"] = False
    ours["num_hidden_layers"] = LAYERS // 2
if model_type == "olmoe":
    ours["num_key_value_heads"] = HEADS
if "kv_lora_rank" in ours:
    ours["num_key_value_heads"] = HEADS
    ours.pop("head_dim", None)  # that of what is turned
if model_type == "qwen3_moe":
    ours["norm_topk_prob"] = True  # as llama.cpp's graph has it
if "expand" in names:  # state-space layers alone, which are smaller
    ours["num_hidden_layers"] = 3 * LAYERS // 2
    ours.pop("intermediate_size", None)
    if "num_heads" in names:
        ours["num_heads"] = names["expand"] * HEADS
special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
config = transformers.AutoConfig.for_model(model_type, **ours, **special)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder)
for file in tokenizer.iterdir():
    if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
        shutil.copy(file, folder)
