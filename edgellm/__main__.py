"""``python -m edgellm`` is the command ``edgellm``."""

from __future__ import annotations

import sys

from edgellm.cli import main

sys.exit(main())
