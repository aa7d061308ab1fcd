"""What measuring for a choice of grids takes in memory, by shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.budget.units import Unit
from edgellm.calibration.cost import layer_weights, pass_cost
from edgellm.calibration.texts import WINDOW_TOKENS
from edgellm.errors import UsageError
from edgellm.source.model import ModelSource

COPIES = 2
"""Float32 weights of the probed layer beside those that the network runs with: rounded, and again
as its graph holds them."""


def measuring_bytes(
    source: ModelSource, units: Sequence[Unit], tokens: int, probe_tokens: int, threads: int
) -> int:
    """Memory of the pass over ``tokens`` and of the probes, beside the process as it is.

    Each of ``units`` has a copy of the ``probe_tokens`` hidden states on its way through the
    layers.
    """
    decoder = source.decoder
    window = min(WINDOW_TOKENS, decoder.context_length)
    passing = pass_cost(decoder, tokens, window, threads, importance_only=False)
    streams = 4 * (1 + len(units)) * probe_tokens * decoder.hidden_size
    return passing.memory_bytes + streams + COPIES * 4 * layer_weights(decoder)


def check_measuring(option: str, needed_bytes: int, memory_bytes: int, threads: int) -> None:
    """Raise ``UsageError`` where measuring would take more memory than there is."""
    if needed_bytes > memory_bytes:
        fewer = "--threads 1 takes less, or " if threads > 1 else ""
        raise UsageError(
            f"{option} measures what each tensor's error costs, which takes about "
            f"{needed_bytes / 1e9:.1f} GB of memory, and there are {memory_bytes / 1e9:.1f} GB: "
            f"{fewer}name a grid (--quant GRID)"
        )
