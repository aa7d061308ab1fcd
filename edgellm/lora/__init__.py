"""LoRA and its kin: adapters read, combined and merged as a lazy transform of the weights."""
