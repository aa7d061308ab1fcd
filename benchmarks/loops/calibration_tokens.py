"""Write the windows that a conversion calibrates on: arguments MODEL OUT.json TOKENS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgellm.calibration.texts import calibration_windows
from edgellm.source import open_source

model, out, tokens = sys.argv[1:]
text = calibration_windows(open_source(model).tokenizer, tokens=int(tokens))
Path(out).write_text(json.dumps({"windows": text.windows}))
