"""GPTQ of ours at int4 against every peer that runs here, symmetric and affine: KL divergence.

All see the same 32 x 512 tokens, start from the same float weights and round the same 210 linear
weights of the blocks in groups of the same length, which is checked in the folders that they write.
Embedding, head and norms stay floats. KL divergence is that of the folders' weights, dequantized
and computed in float32, over 16,384 tokens of held-out text.

Each peer computes in float32 and is set as its documentation advises for quality: gptqmodel with
``desc_act``; llm-compressor's GPTQ in its own static order, its AWQ searching with and without the
weights' sizes; auto-round with its defaults but for ``AUTOROUND_ITERATIONS``. Their folders take
hours, and no figure here is a time: what was found of one is kept in ``results/peers/int4.json`` as
soon as it is found, and taken from there for as long as nothing that it was made of has changed.

`python -m benchmarks.int4 gptqmodel "llm-compressor GPTQ"` asks these peers only and changes no
other result.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results, tables
from benchmarks.measure import fresh, output_of, run
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.places import LOOPS, RESULTS, WORK, edgellm, peer_python, peer_version, shown
from benchmarks.results import Comparison, Result
from benchmarks.text import tokens

CALIBRATION_TOKENS = 32 * 512
WINDOWS = 32
AUTOROUND_ITERATIONS = 50
"""As its own light recipe has them; 200, its default, are an hour and a half for each of four."""

CELLS = tuple((group, zeros) for group in (64, 32) for zeros in ("sym", "affine"))

LAYOUTS = {"sym": "gptq", "affine": "gptq_v2"}
"""Ours; version 1 of the layout cannot hold every zero."""


@dataclass(frozen=True, slots=True)
class Peer:
    """``environment`` names its requirements; ``options`` are the last arguments of ``loop``."""

    environment: str
    package: str
    loop: str
    options: tuple[str, ...]


PEERS = {
    "gptqmodel": Peer("gptqmodel", "GPTQModel", "gptqmodel_quantize.py", ("desc_act",)),
    "llm-compressor GPTQ": Peer(
        "llmcompressor", "llmcompressor", "llmcompressor_quantize.py", ("gptq",)
    ),
    "llm-compressor AWQ": Peer(
        "llmcompressor", "llmcompressor", "llmcompressor_quantize.py", ("awq",)
    ),
    "auto-round": Peer(
        "autoround", "auto-round", "autoround_quantize.py", (str(AUTOROUND_ITERATIONS),)
    ),
}
QUICK_PEERS = ("gptqmodel", "llm-compressor GPTQ")

KEPT = RESULTS / "peers" / "int4.json"
"""By peer and cell: the digest of what its folder was made of, and ``Found`` of it."""

Found = dict[str, Any]
"""What ``float_divergences.py`` says of a folder."""

Figures = dict[str, dict[str, Found]]
"""By cell and by who made the folder."""


def measure(*, quick: bool, names: Sequence[str] = ()) -> Result:
    """KL of all, or of the peers ``names``, at each cell; quick: one cell, two peers, less text."""
    model = smollm2()
    text = tokens(model, 8 if quick else WINDOWS)
    seen = 4 * 512 if quick else CALIBRATION_TOKENS
    windows = WORK / f"calibration-{seen}.json"
    run([sys.executable, str(LOOPS / "calibration_tokens.py"), model.name, windows.name, str(seen)])
    peers = {name: PEERS[name] for name in names or (QUICK_PEERS if quick else PEERS)}
    judge = [sys.executable, str(LOOPS / "float_divergences.py"), model.name, text.path.name]
    judged = {
        "weights": _sha256(model / "model.safetensors"),
        "text": text.sha256,
        "judge": Path(judge[1]).read_text(),
    }
    kept_in = WORK / "int4-peers.json" if quick else KEPT
    figures: Figures = {}
    commands = {}
    for group, zeros in CELLS[:1] if quick else CELLS:
        cell = f"int4-g{group}{'-sym' if zeros == 'sym' else ''}"
        figures[cell] = {}
        for name, peer in peers.items():
            folder = f"{name.replace(' ', '-').lower()}-{cell}-{seen}"
            command = [peer_python(peer.environment), str(LOOPS / peer.loop), model.name]
            command += [windows.name, folder, str(group), zeros, *peer.options]
            made_of = judged | {
                "command": shown(command),
                "program": Path(command[1]).read_text(),
                "packages": Path(command[0]).parents[1].joinpath("installed").read_text(),
                "tokens": windows.read_text(),
            }
            figures[cell][name] = _found_once(
                f"{name}, {cell}", made_of, folder, command, judge, kept_in
            )
            commands[f"{name}, {cell}"] = shown(command)
        command = [*edgellm(), "convert", model.name, "--format", "hf", "--layout", LAYOUTS[zeros]]
        command += ["--quant", f"gptq:{cell}", "--calibration-tokens", str(seen)]
        command += ["--out", f"ours-{cell}", "--no-check"]
        fresh(f"ours-{cell}")
        run(command)
        figures[cell]["edgellm"] = output_of([*judge, f"ours-{cell}"])[f"ours-{cell}"]
        commands[f"edgellm, {cell}"] = shown(command)
    commands["KL"] = shown([*judge, "FOLDER"])
    versions = {
        each.package: peer_version(each.environment, each.package) for each in peers.values()
    }
    light = f" ({AUTOROUND_ITERATIONS} iterations)" if "auto-round" in peers else ""
    return Result(
        benchmark="int4",
        peer="the best of the peers",
        setting=(
            f"{SMOLLM2}; mean KL to it of the dequantized weights, over held-out text, "
            f"{_weights(figures)} linear weights rounded on every side, {seen:,} tokens of "
            f"calibration. Peers: {', '.join(map(' '.join, versions.items()))}{light}."
        ),
        comparisons=[_against_the_best(cell, of) for cell, of in figures.items()],
        commands=commands,
        facts={
            "figures": figures,
            "peers": versions,
            "text_sha256": text.sha256,
            "packages": ["numpy", "onnxruntime"],
        },
    )


def _found_once(
    which: str,
    made_of: dict[str, str],
    folder: str,
    command: list[str],
    judge: list[str],
    kept_in: Path,
) -> Found:
    """What ``judge`` says of the folder that ``command`` makes, or said when it was made before."""
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    if kept.get(which, {}).get("made_of_sha256") != digest:
        fresh(folder)
        run(command, GPTQMODEL_CPU_WORKERS="2")
        found = output_of([*judge, folder])[folder]
        kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
        kept_in.parent.mkdir(exist_ok=True)
        kept[which] = {"made_of_sha256": digest, "found": found}
        kept_in.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    answer: Found = kept[which]["found"]
    return answer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(figures: Figures) -> int:
    """How many weights each folder rounds; raises ``ValueError`` where they are not the same ones.

    Compared are their number, their grids, and the matrices that stay floats.
    """
    counts = set()
    for cell, of in figures.items():
        for name, found in of.items():
            kept = {"rounded": found["rounded"], "floats": found["floats"]}
            counts.add(found["rounded"].get(cell, 0))
            if found["rounded"].keys() != {cell} or found["floats"] != ["token_embd.weight"]:
                raise ValueError(f"{name} rounds other weights than asked for at {cell}: {kept}")
    if len(counts) != 1:
        raise ValueError(f"the folders round different numbers of weights: {sorted(counts)}")
    return counts.pop()


def _against_the_best(cell: str, of: dict[str, dict[str, Any]]) -> Comparison:
    """Our KL and that of the peer with the lowest, whom the comparison names."""
    kl = {name: float(found["kl"]) for name, found in of.items()}
    ours = kl.pop("edgellm")
    best = min(kl, key=kl.__getitem__)
    return Comparison(f"{cell}; {best}", "nats", [ours], [kl[best]], at_most=1.0)


if __name__ == "__main__":
    kept = WORK / "trial.json"
    results.save(measure(quick=False, names=sys.argv[1:]), kept)
    print(tables.render(results.load(kept)))
