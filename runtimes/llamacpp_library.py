"""The llama.cpp that llama-cpp-python brings: found, loaded, silenced, its flaws worked round."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import threading
from collections import deque
from pathlib import Path
from typing import Any

from edgellm.errors import RuntimeMissing
from edgellm.runtimes.openmp import short_spin

INSTALL = 'pip install "edgellm[llamacpp]"'
"""The command that brings it."""

WITHOUT_AMX = "CFLAGS and CXXFLAGS set to '-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'"
AMX_SYMBOL = b"ggml_backend_amx_mul_mat"
FIRST_SOUND_GCC = {11: 5, 12: 4, 13: 3}
"""Minor releases from which GCC compiles AMX code right; all of 14 and later do."""

_log: deque[str] = deque(maxlen=20)
_log_callback: Any = None
_loading = threading.Lock()


def library_folder() -> Path:
    """Where the shared libraries lie; llama-cpp-python must be installed."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("lib")


def load_library() -> Any:
    """llama.cpp's functions, loaded and silenced on first use.

    Raises ``RuntimeMissing`` where llama-cpp-python is not installed or its build does not load.
    """
    global _log_callback
    with _loading, short_spin():
        try:
            import llama_cpp
        except ModuleNotFoundError as error:
            raise RuntimeMissing(f"llama-cpp-python is not installed: {INSTALL}") from error
        except (OSError, RuntimeError) as error:  # its own words for a library that does not load
            raise RuntimeMissing(
                f"llama-cpp-python is installed and its library does not load ({error}): build it "
                f"anew, {INSTALL} --force-reinstall --no-cache-dir"
            ) from error

        first = _log_callback is None
        if first:
            _log_callback = llama_cpp.llama_log_callback(_remember)  # llama.cpp keeps no reference
        # Each time: whoever else uses llama-cpp-python in this process may have set its own.
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        if first:
            llama_cpp.llama_backend_init()
    return llama_cpp.llama_cpp


def miscompiled_amx(folder: Path, features: frozenset[str]) -> str | None:
    """The compiler that made this build's AMX code crash, where this CPU would run it.

    GCC bug 114098: ``_tile_loadconfig`` told the compiler about 8 of its 64 bytes, so the rest was
    optimized away. Fixed in 11.5, 12.4, 13.3 and 14.
    """
    if "amx_int8" not in features:
        return None
    for file in folder.glob("*ggml-cpu*"):
        content = file.read_bytes()
        made_by = re.search(rb"GCC: \([^)]*\) (\d+)\.(\d+)", content)
        if made_by and AMX_SYMBOL in content:
            major, minor = int(made_by[1]), int(made_by[2])
            if major < 11 or minor < FIRST_SOUND_GCC.get(major, 0):
                return f"GCC {major}.{minor}"
    return None


def _remember(level: int, text: bytes, user_data: object) -> None:
    # 3 and 4 are warnings and errors in ggml_log_level, 5 goes on with the line before.
    if level >= 3:
        _log.append(text.decode("utf-8", "replace"))


def forget_log() -> None:
    """Begin anew, so that ``last_words`` are about what comes next."""
    _log.clear()


def last_words() -> str:
    """What llama.cpp last complained about, in one line."""
    lines = " ".join("".join(_log).split("\n")[-4:]).strip()
    return lines or "it gave no reason"
