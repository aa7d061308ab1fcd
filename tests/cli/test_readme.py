"""README.md's commands and its Python run as they stand, on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from edgellm.artifact import open_artifact, verify
from edgellm.cli import COMMANDS
from edgellm.manifest import read_manifest

from .conftest import Command
from .test_convert_adapter import write_adapter

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(
    model: Path, gguf_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the names that the README uses: my-model, model.gguf and two adapters."""
    shutil.copytree(model, tmp_path / "my-model")
    write_adapter(tmp_path / "my-lora", seed=1)
    write_adapter(tmp_path / "other-lora", seed=2)
    main_file = read_manifest(gguf_artifact).artifact.main_file
    shutil.copy(gguf_artifact / main_file, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(command: Command, workplace: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert {shlex.split(line)[1] for line in lines} == COMMANDS.keys() - {"demo"}
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "edgellm"
        done = command(*arguments)
        assert done.code == 0, f"{line}\n{done.err}"
        assert done.out


def test_python(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    verify(open_artifact(workplace / "out"))


def test_exit_codes_are_those_of_the_errors() -> None:
    from edgellm import errors

    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE))
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    raised = {kind.exit_code for kind in classes if issubclass(kind, errors.EdgeError)}
    assert {int(code) for code in table} == raised | {0, 1, 130}
