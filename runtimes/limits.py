"""What every runtime checks before it computes, and says in the same words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgellm.errors import ContextTooLong, GenerationError, RuntimeMissing, UnsupportedTarget
from edgellm.runtimes.session import AdapterFile, Capabilities, Device, KvState

DEFAULT_CONTEXT_TOKENS = 4096
"""Room in the KV cache when nobody asked for more: a model's own limit may take gigabytes."""


def chosen_device(
    found: Capabilities, wanted: Device, otherwise: str = "", compute: str | None = None
) -> str:
    """The device to open something on: ``wanted``, or the first that computes in ``compute``.

    ``otherwise``: one more way out, in words. Raises ``RuntimeMissing`` where the runtime cannot
    open anything here, and ``UnsupportedTarget`` for a device that it has not.
    """
    if not found.available:
        raise RuntimeMissing(found.reason)
    device = found.computing(compute)[0] if wanted == "auto" else wanted
    if device not in found.devices:
        more = f", or {otherwise}" if otherwise else ""
        raise UnsupportedTarget(
            f"{found.runtime} has no {device} here ({found.reason}): choose --device "
            f"{' or '.join(found.devices)}{more}"
        )
    return device


def context_tokens(wanted: int | None, trained: int, path: Path) -> int:
    """Room for the KV cache; raises ``ContextTooLong`` for more than the model was made for."""
    if wanted is None:
        return min(trained, DEFAULT_CONTEXT_TOKENS)
    if not 1 <= wanted <= trained:
        raise ContextTooLong(
            f"a context of {wanted} tokens is not possible, as {path.name} was made for 1 to "
            f"{trained}",
            "choose another --context",
        )
    return wanted


def check_kv_memory(nbytes: int, free_bytes: int, smaller: str) -> None:
    """Raise ``GenerationError`` where keys and values of ``nbytes`` would not fit.

    ``smaller``: what takes less, in words.
    """
    if nbytes > free_bytes:
        raise GenerationError(
            f"keys and values would take {nbytes / 1e6:,.1f} MB, and {free_bytes / 1e6:,.1f} MB of "
            f"memory are free: choose {smaller}"
        )


def check_tokens(token_ids: Sequence[int], held: int, room: int, vocab_size: int) -> None:
    """Raise ``GenerationError`` unless ``token_ids`` exist and fit behind the ``held`` ones."""
    if not len(token_ids):
        raise GenerationError("no tokens to compute: give at least one")
    if held + len(token_ids) > room:
        raise GenerationError(
            f"the context is full: it holds {held} of {room} tokens and {len(token_ids)} more do "
            "not fit. Start over (/clear in a chat), or open the model with a larger --context"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise GenerationError(
            f"token ids must lie in 0..{vocab_size - 1}, and these reach from {low} to {high}: the "
            "tokenizer does not belong to this model"
        )


def check_trim(length: int, held: int) -> None:
    """Raise ``GenerationError`` unless the first ``length`` of ``held`` tokens can be kept."""
    if not 0 <= length <= held:
        raise GenerationError(f"cannot keep {length} tokens: the cache holds {held}")


def check_state(
    state: KvState, runtime: str, room: int, adapters: Sequence[AdapterFile] = ()
) -> None:
    """Raise ``GenerationError`` unless ``state`` is one of ``runtime``'s and fits.

    ``adapters``: those that are applied now, with which it must have been computed.
    """
    if state.runtime != runtime:
        raise GenerationError(
            f"this cache was saved by {state.runtime}, and {runtime} cannot read it: restore it "
            "into the kind of session that saved it"
        )
    if len(state.tokens) > room:
        raise GenerationError(
            f"this cache holds {len(state.tokens)} tokens and the context {room}: open the model "
            "with a larger --context"
        )
    if state.adapters != tuple(adapters):
        raise GenerationError(
            "this cache was computed with other adapters than those that are applied now: apply "
            "the same ones first, or compute it anew"
        )


def first_line(error: BaseException) -> str:
    """What a backend's exception says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


NO_MEMORY = re.compile(
    r"out of memory|failed to allocate|bad_alloc|bad allocation|cudaerrormemoryallocation|"
    r"unable to allocate|insufficient memory|attempting to allocate",
    re.IGNORECASE,
)
DEVICE_GONE = re.compile(
    r"device (is |was )?(lost|removed|not available|unavailable)|device_removed|device_hung|"
    r"no cuda-capable device|unspecified launch failure|cudaerrordevicesunavailable|fallen off",
    re.IGNORECASE,
)
"""What backends say, each in its own way."""


def explained(error: BaseException, device: str = "cpu") -> str:
    """``first_line``, and what to do where memory ran out or the device went away."""
    said = first_line(error)
    instead = "" if device == "cpu" else ", or --device cpu"
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return (
            f"{said} (memory ran out: choose a smaller --context, weights of fewer bits{instead})"
        )
    if DEVICE_GONE.search(str(error)):
        return f"{said} (the device went away: open the model again{instead})"
    return said


def untraced() -> GenerationError:
    """The error of a session that is asked for a trace which it does not keep."""
    return GenerationError("this session keeps no trace: open it with RunOptions(trace=True)")


def closed() -> GenerationError:
    """The error of a session that is used after ``close``."""
    return GenerationError("this session is closed: open the model again")
