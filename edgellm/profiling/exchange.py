"""What a cell's process is told, and what it answers: a line of JSON each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from edgellm.profiling.document import Memory, Task


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to load and what to ask; the rest as in ``document.Settings``.

    ``trace``: where to put the operators' trace, empty for nowhere.
    """

    path: str
    runtime: str
    device: str
    threads: int | None
    kv_cache: str | None
    prompt_tokens: int
    new_tokens: int
    depth_tokens: int
    task: Task = "generate"
    batch: int = 1
    operators: bool = False
    trace: str = ""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The artifact is loaded; ``kv_cache`` and ``device`` as they came to be.

    ``prompt_tokens``: how many a text came to that was to have so many; None where it has them.
    """

    load_s: float
    device: str
    kv_cache: str
    prompt_tokens: int | None = None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and its answer, or batches of texts. Seconds, bytes and joules.

    What they mean stands at ``document.Cell``; None and empty is what the cell's task does not
    have. ``latencies_s``: between tokens, or of an encoder's batches. ``first_text_tokens``: how
    many tokens there were when the first text came; the energy of the prompt ends there.
    ``energy``: by counter, of the prompt and of the rest; ``no_energy``: why a counter is left out.
    """

    tokenization_s: float
    latencies_s: tuple[float, ...]
    cpu_s: float
    memory: Memory
    encode_s: float | None = None
    first_token_s: float | None = None
    prefill_s: float | None = None
    sampling_s: float | None = None
    detokenization_s: float | None = None
    end_to_end_s: float | None = None
    first_text_tokens: int = 0
    text_sha256: str = ""
    energy: dict[str, tuple[float, float]] = {}
    no_energy: tuple[str, ...] = ()


def taken_memory(device: str, kv_bytes: int | None) -> Memory:
    """What this process takes now, and took at most; ``kv_bytes`` of it are keys and values."""
    from edgellm.hardware import peak_memory_bytes
    from edgellm.profiling.device_memory import device_bytes

    resident, shared = _resident()
    return Memory(
        peak_bytes=peak_memory_bytes(),
        steady_bytes=resident,
        steady_shared_bytes=shared,
        device_bytes=device_bytes(device),
        kv_bytes=kv_bytes,
    )


def sha256_of(token_ids: Iterable[int]) -> str:
    """Digest of an answer's tokens, equal wherever they are."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _resident() -> tuple[int, int | None]:
    """Bytes resident now, and with shared pages counted in parts where the system says it."""
    import psutil

    process = psutil.Process()
    try:
        whole = process.memory_full_info()
    except (psutil.Error, OSError):
        return process.memory_info().rss, None
    return whole.rss, getattr(whole, "pss", None)
