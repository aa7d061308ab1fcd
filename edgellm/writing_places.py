"""Places where files will be written, looked at before the work is done that they are for."""

from __future__ import annotations

import os
from pathlib import Path

from edgellm.errors import OutputError


def check_file_place(path: Path) -> None:
    """Raise ``OutputError`` where no file can be written at ``path``, as far as it shows now."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    _check_writable(path.parent, path)


def check_folder_place(path: Path) -> None:
    """Raise ``OutputError`` where ``path`` is no folder, nor one can be made there."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise OutputError(f"cannot write in {path}: {there} is a file; choose another folder")
    _check_writable(there, path)


def _check_writable(folder: Path, path: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise OutputError(
            f"cannot write {path}: the folder {folder} is not writable; choose another"
        )
