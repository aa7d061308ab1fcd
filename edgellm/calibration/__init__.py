"""Calibration: what a model sees before its weights are rounded, and what that says of them."""

BUILT_IN = "builtin"
"""What names a text that comes with edgellm, in the place of a file."""
