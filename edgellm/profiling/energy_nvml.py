"""The energy that NVIDIA's driver counts of its GPUs.

By NVML's ``nvmlDeviceGetTotalEnergyConsumption`` (NVML API reference, device queries): millijoules
since the driver was loaded, on Volta and later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgellm.errors import GenerationError
from edgellm.profiling.system_files import SystemFiles

LIBRARIES = {"Linux": "libnvidia-ml.so.1", "Windows": "nvml.dll"}
NOT_SUPPORTED, NO_PERMISSION = 3, 4
"""Of ``nvmlReturn_t``; 0 is success."""


class NvmlCounter:
    """All GPUs together; not tried on a machine with one yet."""

    name = "NVML"
    step_j: float | None = 1e-3

    def __init__(self, library: Any, devices: Sequence[ctypes.c_void_p]) -> None:
        self._library = library
        self._devices = devices

    def read_j(self) -> float:
        total_mj = 0
        for device in self._devices:
            code, energy_mj = _energy_mj(self._library, device)
            if code:
                raise GenerationError(
                    f"NVML does not count energy any more (its error {code}): measure again"
                )
            total_mj += energy_mj
        return total_mj / 1e3


def nvml_counter(
    files: SystemFiles, load: Callable[[str], Any] = ctypes.CDLL
) -> Iterable[NvmlCounter | str]:
    """The counter, or why there is none although the driver is installed."""
    if files.system not in LIBRARIES:
        return
    try:
        library = load(LIBRARIES[files.system])
    except OSError:  # no driver
        return
    count = ctypes.c_uint()
    code = library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    if code:
        yield f"NVML: the driver does not answer (its error {code}): see `nvidia-smi`"
        return
    devices = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        code = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        code = code or _energy_mj(library, device)[0]
        if code:
            reasons = {
                NOT_SUPPORTED: "it counts no energy (GPUs before Volta do not)",
                NO_PERMISSION: "its energy may not be read: run as root",
            }
            yield f"NVML: GPU {index}: {reasons.get(code, f'error {code} of NVML')}"
            return
        devices.append(device)
    if devices:
        yield NvmlCounter(library, devices)


def _energy_mj(library: Any, device: ctypes.c_void_p) -> tuple[int, int]:
    energy_mj = ctypes.c_ulonglong()
    code = library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy_mj))
    return int(code), energy_mj.value
