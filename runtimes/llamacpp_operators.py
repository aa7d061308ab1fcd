"""What llama.cpp's operators take, asked of it node by node.

``cb_eval`` of a context is called before each node of a graph and, where it answers that it wants
to see the node, after that one was computed alone. Time in between is the node's. So no two are
fused, as llama.cpp does with some where nobody looks, and threads or a GPU are waited for after
each: a token takes longer, small operators most of all.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Sequence
from typing import Any

from edgellm.errors import UnsupportedTarget
from edgellm.runtimes.llamacpp_library import library_folder
from edgellm.runtimes.operators import OperatorEvent, TracedStep

CLOCK = "llama.cpp's evaluation callback, node by node"

SHAPES_ONLY = frozenset({b"NONE", b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE"})
"""Nodes that only look at another's numbers in another way: nothing is computed for them."""

_LAYER = re.compile(r"(?:-|_l)(\d+)(?: \(|$)")
"""``ffn_out-12``, ``Kcur-3 (view)``, ``cache_k_l0 (view)``."""


class OperatorWatch:
    """Times every node of the graphs of one context."""

    def __init__(self, library: Any) -> None:
        """Raises ``UnsupportedTarget`` where this build lacks what tells one node from another."""
        self._name, self._kind = (
            _exported(library, function) for function in ("ggml_get_name", "ggml_op_desc")
        )
        # llama.cpp keeps the pointer alone, so this must live as long as its context.
        self._callback = library.ggml_backend_sched_eval_callback(self._asked)
        self._began = self._node_began = 0.0
        self._seen: list[tuple[bytes, bytes, float, float]] = []
        self._interrupted = False
        self.steps: list[TracedStep] = []

    def set_in(self, context_options: Any) -> None:
        """Let the context that is made with these options be watched."""
        context_options.cb_eval = self._callback

    def begin(self) -> None:
        """Before a graph is computed."""
        self._seen.clear()
        self._began = time.perf_counter()

    def end(self, tokens: int) -> None:
        """After it was, for so many tokens; raises the ``KeyboardInterrupt`` that came meanwhile.

        Python's signal handlers run within the callback, from which nothing can be raised.
        """
        ended = time.perf_counter()
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt
        names = [name.decode("utf-8", "replace") for name, *_ in self._seen]
        events = tuple(
            OperatorEvent(name, kind.decode(), layer, start, end - start)
            for name, layer, (_, kind, start, end) in zip(
                names, layers_of_nodes(names), self._seen, strict=True
            )
        )
        self.steps.append(TracedStep(tokens, self._began, ended - self._began, events))

    def _asked(self, tensor: int, before: bool, _data: object) -> bool:
        ended = time.perf_counter()
        try:
            kind = self._kind(tensor)
            if before:
                # Last, as all that is looked up here is no part of the node's time.
                self._node_began = time.perf_counter()
                return kind not in SHAPES_ONLY
            self._seen.append((self._name(tensor), kind, self._node_began, ended))
        except KeyboardInterrupt:
            self._interrupted = True
        return True


def layers_of_nodes(names: Sequence[str]) -> list[int | None]:
    """The layer of each node of a graph, in the order in which they are computed.

    llama.cpp names most. One without a name of its own (``node_21``) belongs to the layer that
    computes both before and after it.
    """
    named = [int(found[1]) if (found := _LAYER.search(name)) else None for name in names]
    before, after = _carried(named), _carried(named[::-1])[::-1]
    return [
        layer if layer is not None or left != right else left
        for layer, left, right in zip(named, before, after, strict=True)
    ]


def _carried(layers: Sequence[int | None]) -> list[int | None]:
    """Each layer, or the last known one before it."""
    known: int | None = None
    carried = []
    for layer in layers:
        known = known if layer is None else layer
        carried.append(known)
    return carried


def _exported(library: Any, name: str) -> Any:
    """A function of ggml that takes a tensor and gives a text.

    Only through functions do we look at a tensor: its structure changes between releases.
    """
    function = getattr(getattr(library, "_lib", None), name, None)
    if function is None:  # Windows finds in a library nothing that it was only linked with
        files = sorted(library_folder().glob("*ggml-base.*"))
        function = getattr(ctypes.CDLL(str(files[0])), name, None) if files else None
    if function is not None:
        # A prototype of our own: who else uses the library may have declared it in another way.
        prototype = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
        return ctypes.cast(function, prototype)
    raise UnsupportedTarget(
        f"this build of llama.cpp does not export {name}, without which its operators cannot be "
        "told apart: leave the operators out"
    )
