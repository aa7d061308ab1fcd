"""Which base an adapter was trained on, and that base: in full precision, or as it was rounded."""
