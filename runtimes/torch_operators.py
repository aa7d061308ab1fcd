"""What torch's operators take, seen as Python calls them.

Every call of torch's functions by the model passes through a ``TorchFunctionMode``; what such a
function calls itself does not, so that no time is counted twice. A GPU is waited for after each.
``torch.profiler`` is not used: it writes to stderr, only one may run in a process (a second one
crashes it), and reading its records of sixteen tokens takes many seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from edgellm.runtimes.operators import OperatorEvent, TracedStep

WAITS: dict[str, Callable[[], None]] = {
    "cuda": torch.cuda.synchronize,
    "mps": torch.mps.synchronize,
}
"""What returns when a device has computed all that it was given; a CPU has done so already."""


class OperatorWatch(TorchFunctionMode):
    """Times every function that a model calls."""

    def __init__(self, model: Any, device: str) -> None:
        """``device``: as torch names it. Functions are told apart by layer through hooks."""
        super().__init__()
        self._wait = WAITS.get(device)
        self._layer: int | None = None
        self._events: list[OperatorEvent] = []
        self.steps: list[TracedStep] = []
        for index, layer in enumerate(_layers(model)):
            layer.register_forward_pre_hook(self._entering(index))
            layer.register_forward_hook(self._leaving)

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Watch what is computed within, for so many tokens."""
        self._events = []
        self._layer = None
        started = time.perf_counter()
        with self:
            yield
        seconds = time.perf_counter() - started
        self.steps.append(TracedStep(tokens, started, seconds, tuple(self._events)))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name == "__get__":  # a tensor's shape, type or device: nothing is computed
            return func(*args, **(kwargs or {}))
        started = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        if self._wait is not None:
            self._wait()
        seconds = time.perf_counter() - started
        if _computes(name, found):
            kind = name.strip("_")
            self._events.append(OperatorEvent(kind, kind, self._layer, started, seconds))
        return found

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._layer = index

        return enter

    def _leaving(self, *_: object) -> None:
        self._layer = None


def _computes(name: str, found: Any) -> bool:
    """Whether a function did more than tell a fact about a tensor."""
    return name == "__setitem__" or isinstance(found, torch.Tensor | tuple | list)


def _layers(model: Any) -> list[Any]:
    """The decoder's layers, which transformers keeps in a list of so many modules."""
    count = model.config.num_hidden_layers
    lists = (each for each in model.modules() if isinstance(each, torch.nn.ModuleList))
    return next((list(each) for each in lists if len(each) == count), [])
