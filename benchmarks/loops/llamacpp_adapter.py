"""A PEFT adapter as llama.cpp's own ``convert_lora_to_gguf.py`` writes it, for a Llama.

Arguments: ADAPTER OUT.gguf. Factors as they are, one alpha for the file: what that script keeps.
Modules whose rows it would reorder (q_proj, k_proj) are not handled here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

MODULES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")

folder, out = Path(sys.argv[1]), sys.argv[2]
config = json.loads((folder / "adapter_config.json").read_text())
writer = gguf.GGUFWriter(out, "llama")
writer.add_string("general.type", "adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
for key, values in sorted(load_file(folder / "adapter_model.safetensors").items()):
    found = KEY.fullmatch(key)
    if found is None or found[2] not in MODULES:
        raise SystemExit(f"{key} is not handled here")
    name = f"blk.{found[1]}.{MODULES[found[2]]}.weight.lora_{found[3].lower()}"
    writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
