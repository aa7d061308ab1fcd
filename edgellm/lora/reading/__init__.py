"""Adapters read from disk: configs, keys and parts of PEFT's folders and of GGUF files, checked."""
