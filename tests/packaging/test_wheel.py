"""What ships is what git holds, and it works where it is installed."""

from __future__ import annotations

import json
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from edgellm.demo_model import demo_model

from .conftest import run

IMPORT_ALL = """
import importlib, json, pkgutil, edgellm
names = [module.name for module in pkgutil.walk_packages(edgellm.__path__, "edgellm.")]
files = {name: importlib.import_module(name).__file__ for name in names if "__main__" not in name}
print(json.dumps(files))
"""


def packaged(tracked: list[str]) -> set[str]:
    """Where each tracked file of the package stands in the wheel."""
    places = {
        "edgellm/": "edgellm/",
        "export/": "edgellm/export/",
        "runtimes/": "edgellm/runtimes/",
    }
    return {
        place + name.removeprefix(folder)
        for name in tracked
        for folder, place in places.items()
        if name.startswith(folder)
    }


def test_wheel_holds_what_git_holds(wheel: Path, tracked_files: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == packaged(tracked_files)


def test_wheel_says_its_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(info).decode()
        names = archive.namelist()
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "edgellm = edgellm.cli:main" in entry_points


def test_base_install_asks_for_neither_torch_nor_a_compiler(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(info).decode().splitlines()
    base = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert base
    heavy = ("torch", "transformers", "llama")
    assert not [line for line in base if any(word in line for word in heavy)]


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Without the links: the wheel was built from a checkout that has none."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    files = json.loads(
        run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    )
    assert {"edgellm.export.layout", "edgellm.runtimes.session", "edgellm.cli"} <= set(files)
    assert all(file.startswith(str(tmp_path)) for file in files.values())


def test_editable_install_of_a_checkout_without_links(
    checkout_without_links: Path, tmp_path: Path
) -> None:
    """The links are a convenience: an editable install finds both packages by their map."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = next((tmp_path / "venv").glob("*/python"))
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    ours = Path(pytest.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{ours}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    options = ("--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "install", *options, "--editable", checkout_without_links)
    code = "import edgellm.export.layout as module; print(module.__file__)"
    found = run(python, "-c", code, cwd=tmp_path).strip()
    assert Path(found) == checkout_without_links / "export" / "layout.py"


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed with its dependencies and nothing else, it converts and runs a real model."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = next((tmp_path / "venv").glob("*/python"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", wheel)
    edgellm = python.with_name("edgellm")
    out = tmp_path / "small"
    quiet = {"env": {"HOME": str(tmp_path), "PATH": str(python.parent), "HF_HUB_OFFLINE": "1"}}

    assert "convert" in run(edgellm, "--help", **quiet)
    assert json.loads(run(edgellm, "doctor", "--json", **quiet))["default_container"] == "onnx"
    made = run(
        edgellm,
        "convert",
        demo_model(),
        "-q",
        "rtn:int4-g32",
        "--out",
        out,
        "--json",
        cwd=tmp_path,
        **quiet,
    )
    assert json.loads(made)["manifest"]["artifact"]["container"] == "onnx"
    run(edgellm, "verify", out, **quiet)
    question = ("run", out, "The capital of France is", "--raw", "--temperature", "0", "--json")
    answer = json.loads(run(edgellm, *question, "--max-tokens", "4", **quiet))
    assert "Paris" in answer["text"]
    modules = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'))").strip()
    assert modules == "None"
