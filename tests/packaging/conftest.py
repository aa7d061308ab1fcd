"""The project as a wheel, built from what git holds and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = {"edgellm/export": "export", "edgellm/runtimes": "runtimes"}


def run(*command: str | Path, cwd: Path | None = None, **options: object) -> str:
    """stdout of a command; a failure shows both of its streams."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tracked_files() -> list[str]:
    """Paths that git holds or would add, the two links left out."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: this is what the wheel is compared with")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.splitlines() if name not in LINKS and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def checkout_without_links(
    tracked_files: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of the tracked files as a checkout has them where links are not supported."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked_files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return copy


@pytest.fixture(scope="session")
def wheel(checkout_without_links: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout_without_links)
    (made,) = folder.glob("*.whl")
    return made
