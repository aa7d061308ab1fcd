"""Memory that this process takes of a GPU: by its runtime's own count, or by NVIDIA's driver."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from edgellm.profiling.energy_nvml import LIBRARIES
from edgellm.profiling.system_files import SystemFiles

TOO_SMALL = 7
"""``NVML_ERROR_INSUFFICIENT_SIZE``: the table that was given has fewer rows than processes."""

NOT_AVAILABLE = 2**64 - 1
"""``NVML_VALUE_NOT_AVAILABLE``, as Windows' display driver has it."""


class ProcessInfo(ctypes.Structure):
    """``nvmlProcessInfo_t`` (NVML API reference, device structures)."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint),
        ("computeInstanceId", ctypes.c_uint),
    )


def device_bytes(device: str) -> int | None:
    """What is taken of the memory of ``device``; None where nobody tells, and of a CPU.

    Of torch and MLX the most that it was, else what it is now, with the code of the kernels.
    """
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if device == "cuda" and torch is not None:
        return int(torch.cuda.max_memory_allocated())
    if device == "metal" and mlx is not None:
        return int(mlx.get_peak_memory())
    if device == "metal" and torch is not None:
        return int(torch.mps.driver_allocated_memory())
    return nvml_bytes(SystemFiles(), os.getpid()) if device == "cuda" else None


def nvml_bytes(
    files: SystemFiles, pid: int, load: Callable[[str], Any] = ctypes.CDLL
) -> int | None:
    """What the process ``pid`` has of all NVIDIA GPUs; not tried on a machine with one yet.

    None where the driver does not know the process, as in containers with numbers of their own.
    """
    if files.system not in LIBRARIES:
        return None
    try:
        library = load(LIBRARIES[files.system])
    except OSError:
        return None
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    used = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        if not library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            used += [
                each.usedGpuMemory
                for each in _processes(library, device)
                if each.pid == pid and each.usedGpuMemory != NOT_AVAILABLE
            ]
    return sum(used) if used else None


def _processes(library: Any, device: ctypes.c_void_p) -> list[ProcessInfo]:
    """Those that compute on ``device``; none where the driver does not say."""
    rows = ctypes.c_uint(64)
    while True:
        table = (ProcessInfo * rows.value)()
        code = library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(rows), table)
        if code == 0:
            return list(table[: rows.value])
        if code != TOO_SMALL or rows.value <= len(table):
            return []
