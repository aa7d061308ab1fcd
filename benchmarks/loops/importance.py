"""Write the importance matrix of the text that conversions calibrate on, for llama.cpp.

Arguments: MODEL OUT.gguf TOKENS.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgellm.calibration.passes import CalibrationPass
from edgellm.calibration.texts import calibration_windows
from edgellm.quant.imatrix_file import write_imatrix
from edgellm.source import open_source

model, out, tokens = sys.argv[1:]
source = open_source(model)
text = calibration_windows(source.tokenizer, tokens=int(tokens))
steps = CalibrationPass(source, text.windows, importance_only=True)
steps.begin()
importance = {}
for index in range(len(source.decoder.layers)):
    importance |= {role: found.importance for role, found in steps.layer(index).items()}
importance["output.weight"] = steps.head().importance
length = len(text.windows[0])
write_imatrix(Path(out), importance, tokens=text.tokens, chunk_tokens=length)
