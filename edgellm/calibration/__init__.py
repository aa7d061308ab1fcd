"""Calibration: what a model sees before its weights are rounded, and what that says of them."""
