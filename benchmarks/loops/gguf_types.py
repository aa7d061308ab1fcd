"""Which types the tensors of GGUF files really have, as JSON: by file, by type, bytes and counts.

Arguments: FILE.gguf... Norms and other vectors are left out. ``tensors`` counts the matrices by
what they are: ``{"ffn_down": 15}``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import gguf

found = {}
for file in sys.argv[1:]:
    types: dict[str, dict[str, object]] = {}
    nbytes: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            name = tensor.tensor_type.name.lower()
            role = tensor.name.removesuffix(".weight").rpartition(".")[2]
            nbytes[name] += int(tensor.n_bytes)
            counts.setdefault(name, Counter())[role] += 1
    for name, size in nbytes.most_common():
        types[name] = {"bytes": size, "tensors": dict(sorted(counts[name].items()))}
    found[file] = types
print(json.dumps(found))
