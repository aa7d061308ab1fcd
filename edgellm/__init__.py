"""edgellm: quantize language models for the machine in front of you, and run them there."""

from __future__ import annotations

__version__ = "0.1.0"
