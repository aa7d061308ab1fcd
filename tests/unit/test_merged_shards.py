"""Merged shards: headers, bytes that stay, and digests taken while pieces come in any order."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgellm.errors import TensorError
from edgellm.export.hf_folder import changed_config, companion_files
from edgellm.export.ordered_digest import OrderedDigest
from edgellm.export.shard_writer import ShardWriter
from edgellm.export.to_safetensors import lay_out_shards, pieces_of
from edgellm.export.writer import StagedFolder
from edgellm.lora.edit import LowRank, Target
from edgellm.lora.named_weights import ChangedWeight
from edgellm.parallel import in_parallel
from edgellm.source.safetensors_file import SafetensorsFile, read_safetensors
from edgellm.tensors import constant

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "BOOL": np.bool_}


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> SafetensorsFile:
    names = {np.dtype(kind): dtype for dtype, kind in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    content = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return read_safetensors(path)


def change(name: str, array: np.ndarray, **options: bool) -> tuple[ChangedWeight, np.ndarray]:
    """A rank-1 edit of ``array``, and what comes out in float32."""
    draw = np.random.default_rng(len(name))
    a = draw.standard_normal((1, array.shape[1]), np.float32)
    b = draw.standard_normal((array.shape[0], 1), np.float32)
    edit = LowRank(constant("a", a), constant("b", b), 0.5)
    wanted = array.astype(np.float32) + np.float32(0.5) * (b * a)
    target = Target(name, array.shape, "linear")
    return ChangedWeight(target, constant(name, array), edit, **options), wanted


def written(
    files: list[SafetensorsFile],
    changed: dict[str, ChangedWeight],
    added: dict[str, ChangedWeight],
    out: Path,
    *,
    dtype: str | None = None,
    threads: int = 2,
) -> ShardWriter:
    shards = lay_out_shards(files, changed, added, dtype)
    with StagedFolder(out) as staged:
        for shard in shards:
            staged.create_data_file(shard.name, shard.nbytes)
        writer = ShardWriter(shards, staged)
        list(in_parallel(writer.work, pieces_of(shards), threads, on_end=writer.stop))
        staged.sync()
        staged.commit()
    return writer


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    return {
        "ids": np.arange(7),
        "big": draw.standard_normal((900, 3000)).astype(np.float16),
        "mask": np.array([True, False, True]),
        "small": draw.standard_normal((5, 3)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_what_changes_and_what_stays(
    tensors: dict[str, np.ndarray], threads: int, tmp_path: Path
) -> None:
    base = write_file(tmp_path / "model.safetensors", tensors)
    edited, wanted = change("big", tensors["big"])
    writer = written([base], {"big": edited}, {}, tmp_path / "out", threads=threads)
    before = (tmp_path / "model.safetensors").read_bytes()
    after = (tmp_path / "out" / "model.safetensors").read_bytes()
    entry = base.tensors["big"]
    start, stop = entry.offset, entry.offset + entry.nbytes
    assert (after[:start], after[stop:]) == (before[:start], before[stop:])
    got = np.frombuffer(after[start:stop], np.float16).reshape(900, 3000)
    assert np.array_equal(got, wanted.astype(np.float16))
    assert writer.base_digests[0].hexdigest(len(before)) == hashlib.sha256(before).hexdigest()
    assert writer.file_digests[0].hexdigest(len(after)) == hashlib.sha256(after).hexdigest()


def test_new_and_larger_tensors_make_a_new_header(
    tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    base = write_file(tmp_path / "model.safetensors", tensors)
    larger, wanted = change("small", np.ones((9, 3), np.float32), replaced=True)
    head, head_wanted = change("head", np.ones((4, 3), np.float32))
    writer = written([base], {"small": larger}, {"head": head}, tmp_path / "out")
    made = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert list(made.tensors) == [*tensors, "head"]
    assert np.array_equal(made.ref("small").load(), wanted)
    assert np.array_equal(made.ref("head").load(), head_wanted)
    for name in ("ids", "big", "mask"):
        ours, theirs = made.tensors[name], base.tensors[name]
        content = made.file.read(ours.offset, ours.nbytes)
        assert np.array_equal(content, base.file.read(theirs.offset, theirs.nbytes))
    before = (tmp_path / "model.safetensors").read_bytes()
    assert writer.base_digests[0].hexdigest(len(before)) == hashlib.sha256(before).hexdigest()


def test_a_dtype_is_for_floats_alone(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    base = write_file(tmp_path / "model.safetensors", tensors)
    written([base], {}, {}, tmp_path / "out", dtype="f32")
    made = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert [entry.dtype for entry in made.tensors.values()] == ["I64", "F32", "BOOL", "F32", "F32"]
    assert np.array_equal(made.ref("big").load(), tensors["big"].astype(np.float32))


def test_a_change_of_integers_is_refused(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    tensors["codes"] = np.ones((4, 4), np.int64)
    base = write_file(tmp_path / "model.safetensors", tensors)
    edited, _ = change("codes", tensors["codes"])
    with pytest.raises(TensorError, match="codes is stored as I64"):
        lay_out_shards([base], {"codes": edited}, {})


def test_a_failure_leaves_nobody_waiting(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    base = write_file(tmp_path / "model.safetensors", tensors)
    edited, _ = change("big", tensors["big"] * 0 + 60000)
    edited.edit.__dict__["scale"] = 1e6  # frozen, and beyond what f16 holds
    with pytest.raises(Exception, match="big does not fit F16"):
        written([base], {"big": edited}, {}, tmp_path / "out", threads=3)
    assert not (tmp_path / "out").exists()


def test_pieces_in_any_order_give_the_digest_of_the_whole() -> None:
    content = np.random.default_rng(1).integers(0, 256, 100_000).astype(np.uint8)
    offsets = list(range(0, len(content), 777))
    for seed in range(5):
        digest = OrderedDigest()
        order = [*offsets]
        # Begun in order, ended in any: neighbours change places within a window.
        windows = [order[i : i + 4] for i in range(0, len(order), 4)]
        for window in windows:
            random.Random(seed).shuffle(window)
        shuffled = [offset for window in windows for offset in window]
        pieces = [content[at : at + 777] for at in shuffled]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(digest.add, shuffled, pieces))
        assert digest.hexdigest(len(content)) == hashlib.sha256(content.tobytes()).hexdigest()


def test_a_config_changes_where_it_must_and_nowhere_else() -> None:
    plain = b'{"vocab_size": 5,  "x": [1,2]}'
    assert changed_config(plain, {"vocab_size": 5}) == plain
    assert json.loads(changed_config(plain, {"vocab_size": 6})) == {"vocab_size": 6, "x": [1, 2]}
    nested = b'{"text_config": {"vocab_size": 5, "tie_word_embeddings": true}}'
    changed = json.loads(changed_config(nested, {"vocab_size": 6, "tie_word_embeddings": False}))
    assert changed == {"text_config": {"vocab_size": 6, "tie_word_embeddings": False}}


def test_files_that_go_along(tmp_path: Path) -> None:
    names = ("config.json", "tokenizer.json", "modeling_own.py", "LICENSE", "README.md")
    left = ("model.safetensors", "pytorch_model.bin", ".gitattributes", "manifest.json")
    for name in (*names, *left):
        (tmp_path / name).write_text(name)
    (tmp_path / "original").mkdir()
    files, notes = companion_files(tmp_path)
    assert set(files) == {*names} - {"README.md"}
    assert any("original" in note for note in notes)
    assert any("trust_remote_code" in note for note in notes)
