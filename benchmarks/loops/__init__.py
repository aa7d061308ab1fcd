"""Programs that the benchmarks start; each stands alone, so that a peer's loads nothing of ours."""
