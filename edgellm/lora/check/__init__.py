"""The doctor: what adapters would do to a base, what is wrong, what is left after rounding."""
