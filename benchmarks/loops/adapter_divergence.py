"""How far llama.cpp's answers with an adapter beside a model are from PEFT's.

Arguments: FILE.gguf ADAPTER.gguf|none TOKENS.json REFERENCE.npy, through llama-cpp-python's C
functions alone. Prints JSON: ``kl``, the mean of KL(reference || model) in nats.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

path, adapter, tokens, reference = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
expected = np.load(reference, mmap_mode="r")

llama_cpp.llama_backend_init()
loading = llama_cpp.llama_model_default_params()
loading.use_extra_bufts = False
model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = len(windows[0])
context = llama_cpp.llama_init_from_model(model, settings)
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
if adapter != "none":
    loaded = llama_cpp.llama_adapter_lora_init(model, adapter.encode())
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    scales = (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
        raise SystemExit("the adapter was not taken")

divergences = []
for window, wanted in zip(windows, expected, strict=True):
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(window), 0, 1)
    batch.n_tokens = len(window)
    for place, token in enumerate(window):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    pointer = llama_cpp.llama_get_logits(context)
    logits = np.ctypeslib.as_array(pointer, shape=(len(window), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    divergences.append((np.exp(wanted) * (wanted - logits)).sum(axis=-1))
print(json.dumps({"kl": float(np.mean(divergences))}))
