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

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), FFN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    "head_dim": HIDDEN // HEADS,
    "query_pre_attn_scalar": HIDDEN // HEADS,
    "rotary_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
}
"""By the names that config classes have for them."""

model_type, folder, tokenizer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
names = transformers.AutoConfig.for_model(model_type).to_dict()
ours = {name: size for name, size in SIZES.items() if name in names}
special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
config = transformers.AutoConfig.for_model(model_type, **ours, **special)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(folder)
for file in tokenizer.iterdir():
    if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
        shutil.copy(file, folder)
