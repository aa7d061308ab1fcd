"""ONNX folders made from a layout alone, and logits by onnxruntime without our own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgellm.export.layout import Layout, OutputTensor
from edgellm.export.packing import PACKERS
from edgellm.export.to_onnx import lay_out
from edgellm.quant.rtn import solve
from edgellm.recipe import Recipe
from edgellm.slabs import stored_rows
from edgellm.source import open_source

ROWS = 100
"""Rows at a time; not a multiple of anything, so that slabs begin inside of heads."""


def write_onnx(source: Path, folder: Path, quant: str = "f32", **fields: Any) -> Layout:
    """The layout of ``source``, carried out into ``folder``."""
    recipe = Recipe(source=str(source), format="onnx", quant=quant, **fields)
    layout = lay_out(open_source(str(source)), recipe)
    write_layout(layout, folder)
    return layout


def write_layout(layout: Layout, folder: Path) -> None:
    """Every file of ``layout``, its tensors rounded to nearest."""
    folder.mkdir(exist_ok=True)
    for name, content in layout.files.items():
        (folder / name).write_bytes(content)
    ((name, nbytes),) = layout.data_files.items()
    with (folder / name).open("wb") as file:
        file.truncate(nbytes)
        for tensor in layout.tensors:
            for start, stop in _slabs(tensor):
                rows = stored_rows(tensor, start, stop)
                packed = PACKERS[tensor.packer].pack(solve(rows, tensor.grid))
                assert packed.keys() == {array.component for array in tensor.arrays}
                for array in tensor.arrays:
                    assert packed[array.component].shape == (len(rows), array.row_bytes)
                    file.seek(array.offset + start * array.row_bytes)
                    file.write(packed[array.component].tobytes())


def _slabs(tensor: OutputTensor) -> Iterator[tuple[int, int]]:
    each = tensor.rows // tensor.experts
    for first in range(0, tensor.rows, each):
        for start in range(first, first + each, ROWS):
            yield start, min(start + ROWS, first + each)


class Graph:
    """A decoder graph and one sequence's buffers, which past and present share."""

    def __init__(self, folder: Path, context_tokens: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.buffers = {
            given.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros(
                    (1, given.shape[1], context_tokens, given.shape[3]),
                    np.int8 if given.type == "tensor(int8)" else np.float32,
                )
            )
            for given in self.session.get_inputs()
            if given.name.startswith("past_key_values.")
        }
        self.length = 0

    def step(self, token_ids: Sequence[int], logits_from: int | None = None) -> np.ndarray:
        """Logits ``[positions, vocab]`` of the tokens from ``logits_from``; the last by default."""
        self.length += len(token_ids)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.asarray([token_ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        if logits_from is not None:
            start = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray([logits_from], np.int64))
            binding.bind_ortvalue_input("logits_from", start)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()[0]
        return logits


def logits(folder: Path, token_ids: Sequence[int], steps: Sequence[int] = ()) -> np.ndarray:
    """``[tokens, vocab]``; ``steps``: how many tokens at a time, one by one beyond their sum."""
    graph = Graph(folder, len(token_ids) + 3)
    sizes = [*steps, *[1] * (len(token_ids) - sum(steps))] if steps else [len(token_ids)]
    found, done = [], 0
    for size in sizes:
        found.append(graph.step(token_ids[done : done + size], 0))
        done += size
    return np.concatenate(found)
