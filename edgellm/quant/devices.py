"""Where kernels can be solved: numpy on the CPU, or torch on a GPU, which is asked for by name.

Nothing here imports torch unless another device than ``cpu`` was asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from edgellm.errors import GenerationError, RuntimeMissing, UnsupportedTarget, UsageError
from edgellm.quant.arrays import moved
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

CPU, AUTO = "cpu", "auto"


@dataclass(frozen=True, slots=True)
class TorchDevice:
    """``torch_name`` is torch's name of it. ``missing`` says why it cannot be used, "" if it can.

    ``title`` names the processor.
    """

    torch_name: str
    missing: Callable[[Any], str]
    title: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The device that solves, and why; ``title`` is the processor's name, "" for the CPU."""

    name: str
    reason: str
    title: str = ""


def _no_cuda(torch: Any) -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA: install one of pytorch.org's"
    return f"torch {torch.__version__} finds no GPU: is its driver installed (nvidia-smi)?"


def _no_metal(torch: Any) -> str:
    if torch.backends.mps.is_available():
        return ""
    if not torch.backends.mps.is_built():
        return f"torch {torch.__version__} was built without Metal, which macOS alone has"
    return f"torch {torch.__version__} finds no GPU that it can use, or macOS is too old"


TORCH_DEVICES: dict[str, TorchDevice] = {
    "cuda": TorchDevice("cuda", _no_cuda, lambda torch: str(torch.cuda.get_device_name())),
    "metal": TorchDevice("mps", _no_metal, lambda torch: "Metal"),
}
"""By our name, the first that is there for ``auto``."""


def choose(asked: str | None) -> Choice:
    """The device to solve on: ``cpu`` unless another one was asked for.

    Raises ``UsageError`` for a name that is none, ``RuntimeMissing`` without torch and
    ``UnsupportedTarget`` for a device that is not here.
    """
    if asked is None or asked == CPU:
        return Choice(CPU, "")
    if asked != AUTO and asked not in TORCH_DEVICES:
        names = ", ".join([AUTO, CPU, *TORCH_DEVICES])
        raise UsageError(f"no device named {asked!r} to solve on: choose {names}")
    if importlib.util.find_spec("torch") is None:
        if asked == AUTO:
            return Choice(CPU, "torch, which solves on GPUs, is not installed")
        raise RuntimeMissing(
            f"--device {asked} solves with torch, which is not installed: pip install "
            "'edgellm[calibrate]', or leave --device out (the CPU needs no torch)"
        )
    import torch

    lacking = []
    for name in TORCH_DEVICES if asked == AUTO else [asked]:
        device = TORCH_DEVICES[name]
        missing = device.missing(torch)
        if not missing:
            title = device.title(torch)
            return Choice(name, f"{title}, by torch {torch.__version__}", title)
        lacking.append(f"{name}: {missing}")
    if asked == AUTO:
        return Choice(CPU, f"no GPU that torch can use ({'; '.join(lacking)})")
    raise UnsupportedTarget(
        f"--device {asked} is not to be had here: {lacking[0].partition(': ')[2]} "
        f"(or leave --device out: the CPU solves the same)"
    )


def torch_name(name: str | None) -> str | None:
    """torch's name of the device that was chosen, None for the CPU, where numpy solves."""
    return None if name is None or name == CPU else TORCH_DEVICES[name].torch_name


def hessian_on(statistics: Statistics, torch_device: str | None) -> Array:
    """The Hessian on torch's device, moved there once; numpy's where that is None."""
    return statistics.once(
        f"hessian on {torch_device}", lambda: moved(statistics.hessian, torch_device)
    )


_LOCK = Lock()


@contextmanager
def turn(torch_device: str | None) -> Iterator[None]:
    """Alone on the device meanwhile; None, where numpy solves, waits for nobody.

    Workers that shared a device would only take more of its memory. Raises ``GenerationError``
    when torch fails there.
    """
    if torch_device is None:
        yield
        return
    with _LOCK:
        try:
            yield
        except RuntimeError as error:  # torch's root, out of memory too
            raise GenerationError(
                f"torch failed while it solved on {torch_device}: {error}. Leave --device out to "
                "solve on the CPU"
            ) from error
