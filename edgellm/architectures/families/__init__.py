"""One file for each ``model_type``: its config, its tensors, and its graph in llama.cpp."""
