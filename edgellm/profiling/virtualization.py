"""Whether the machine is a virtual one.

The rules are those of ``systemd-detect-virt`` (systemd, ``src/basic/virt.c``) in short: what the
firmware is named, what the kernel says of a hypervisor, and the CPU's flag for one.
"""

from __future__ import annotations

import importlib
import subprocess
from typing import Any

from edgellm.hardware import Fact
from edgellm.profiling.system_files import SystemFiles, text

FIRMWARE = ("product_name", "sys_vendor", "board_vendor", "bios_vendor", "product_version")
"""Files of ``/sys/class/dmi/id``, in systemd's order."""

NAMES = {
    "KVM": "KVM",
    "OpenStack": "KVM (OpenStack)",
    "KubeVirt": "KVM (KubeVirt)",
    "Amazon EC2": "Amazon EC2",
    "QEMU": "QEMU",
    "VMware": "VMware",
    "VMW": "VMware",
    "innotek GmbH": "VirtualBox",
    "VirtualBox": "VirtualBox",
    "Oracle Corporation": "VirtualBox",
    "Xen": "Xen",
    "Bochs": "Bochs",
    "Parallels": "Parallels",
    "BHYVE": "bhyve",
    "Hyper-V": "Hyper-V",
    "Virtual Machine": "Hyper-V",
    "Apple Virtualization": "Apple Virtualization",
    "Google Compute Engine": "Google Compute Engine",
}
"""How names in the firmware begin, and whose they are. ``Virtual Machine`` is what Microsoft's own
computers are not called, while their vendor is the same."""

NONE = "none seen"


def virtual_machine(files: SystemFiles) -> Fact[str]:
    """Whose virtual machine this is, ``none seen``, or empty with the reason in ``reason``."""
    if files.linux:
        return _linux(files)
    if files.system == "Darwin":
        return _darwin()
    if files.system == "Windows":
        return _windows()
    return Fact("", f"no rule for {files.system}")


def _linux(files: SystemFiles) -> Fact[str]:
    firmware = [text(files.sys / "class/dmi/id" / name) or "" for name in FIRMWARE]
    cpuinfo = text(files.proc / "cpuinfo") or ""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    kernel = text(files.proc / "sys/kernel/osrelease") or ""
    if "microsoft" in kernel.lower():
        return Fact("Hyper-V (WSL)", "the kernel's name")
    # A whole machine of EC2 is named after its size, and is none of its virtual machines.
    if ".metal" not in firmware[0] and (name := _named(firmware)):
        return Fact(name, "firmware")
    if kind := text(files.sys / "hypervisor/type"):
        return Fact(kind.capitalize(), "/sys/hypervisor")
    if compatible := text(files.proc / "device-tree/hypervisor/compatible"):
        return Fact(compatible.partition("\0")[0], "device tree")
    if "hypervisor" in flags:
        return Fact("unnamed hypervisor", "flag in /proc/cpuinfo")
    if flags or any(firmware):
        return Fact(NONE, "no hypervisor in firmware and CPU flags")
    return Fact("", "neither the firmware's names nor a CPU flag can be read")


def _named(words: list[str]) -> str:
    for word in words:
        for start, name in NAMES.items():
            if word.startswith(start):
                return name
    return ""


def _darwin() -> Fact[str]:
    """From ``sysctl kern.hv_vmm_present``; not tried on a Mac yet."""
    try:
        said = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.hv_vmm_present"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return Fact("", f"sysctl does not answer ({type(error).__name__})")
    answers = {"0": NONE, "1": "unnamed hypervisor"}
    return Fact(answers.get(said, ""), "sysctl knows no kern.hv_vmm_present")


def _windows() -> Fact[str]:
    """From the firmware's names in the registry; not tried on Windows yet."""
    try:
        registry: Any = importlib.import_module("winreg")
        with registry.OpenKey(
            registry.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\BIOS"
        ) as key:
            names = ("SystemProductName", "SystemManufacturer", "BIOSVendor")
            words = [str(registry.QueryValueEx(key, name)[0]) for name in names]
    except (ImportError, OSError) as error:
        return Fact("", f"the registry does not say ({type(error).__name__})")
    return Fact(_named(words) or NONE, "firmware")
