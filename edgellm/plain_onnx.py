"""The answers of a plain ONNX decoder, as onnxruntime-genai's builder and optimum export them.

For measuring alone: a window is computed at once, from empty caches. What a graph asks for is told
by the names that exporters agree on (``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.*``); any other input is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.artifact import GENAI_CONFIG
from edgellm.errors import GenerationError, RuntimeMissing, SourceError, UnsupportedTarget
from edgellm.evaluation import Logits
from edgellm.manifest import MANIFEST

if TYPE_CHECKING:
    from edgellm.evaluation_text import Passage
    from edgellm.tokenization import Tokenizer

NAMES = ("model.onnx", "onnx/model.onnx")
"""Where exporters put the decoder, relative to the folder with the tokenizer."""

DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}

FIRST_ROW = "logits_from"
"""Of our own graphs: the place from which on logits are computed."""


def onnx_file(folder: Path) -> Path | None:
    """The decoder of a plain ONNX folder; None for a folder without one, or with a manifest."""
    if (folder / MANIFEST).exists():
        return None
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


class PlainOnnxAnswers:
    """The answers of the graph ``model``, whose tokenizer and config lie in ``folder``."""

    runtime = "onnxruntime"

    def __init__(self, folder: Path, model: Path, threads: int | None = None) -> None:
        """Raises ``UnsupportedTarget`` for a graph that asks for more than a decoder needs."""
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeMissing("onnxruntime is not installed: pip install onnxruntime") from error
        from edgellm.hardware import detect
        from edgellm.runtimes.ort import errors_of
        from edgellm.tokenization import Tokenizer

        self.name = str(folder)
        note = f"{folder.name} has no manifest: it is measured, unverified"
        self.notes: tuple[str, ...] = (note,)
        config = _configs(folder)
        self.context_tokens = _context_tokens(folder, config)
        self._head_dim = _head_dim(config)
        self._tokenizer = Tokenizer.from_hf_folder(folder)
        self._errors = errors_of(onnxruntime)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or detect().physical_cores.value
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except self._errors as error:
            raise GenerationError(f"onnxruntime could not load {model}: {error}") from error
        outputs = [output.name for output in self._session.get_outputs()]
        if "logits" not in outputs:
            raise UnsupportedTarget(
                f"{model} has no output named logits (it has {', '.join(outputs[:4])}): a decoder "
                "with a language model's head is needed"
            )
        optional = self._session.get_overridable_initializers()
        self._inputs = {
            given.name: given
            for given in (
                *self._session.get_inputs(),
                *(given for given in optional if given.name == FIRST_ROW),
            )
        }
        self._feed(np.zeros(1, np.int64))  # an input that is not known shows now

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        return self._tokenizer.sha256()

    def logits(self, passages: Sequence[Passage]) -> Iterator[Logits]:
        """As ``answers.Answers.logits``."""
        for passage in passages:
            feed = self._feed(np.asarray(passage.ids, np.int64))
            try:
                (rows,) = self._session.run(["logits"], feed)
            except self._errors as error:
                raise GenerationError(
                    f"onnxruntime could not compute {len(passage.ids)} tokens of {self.name}: "
                    f"{error}"
                ) from error
            if rows.shape[1] != len(passage.ids):
                raise UnsupportedTarget(
                    f"{self.name} gives the logits of {rows.shape[1]} of {len(passage.ids)} "
                    "tokens: measuring needs those of all (export without pruning the logits)"
                )
            yield rows[0, passage.first :].astype(np.float32, copy=False)

    def close(self) -> None:
        self._session = None

    def _feed(self, ids: Any) -> dict[str, Any]:
        """What the graph asks for, for one window from its begin."""
        known: dict[str, Any] = {
            "input_ids": ids[np.newaxis],
            "attention_mask": np.ones((1, len(ids))),
            "position_ids": np.arange(len(ids))[np.newaxis],
            FIRST_ROW: np.zeros(1),
            "use_cache_branch": np.zeros(1, np.bool_),
        }
        feed = {}
        for name, given in self._inputs.items():
            if name in known:
                feed[name] = known[name].astype(DTYPES.get(given.type, known[name].dtype))
            elif name.startswith(("past_key_values.", "past.")) and given.type in DTYPES:
                feed[name] = np.zeros(self._empty_past(given), DTYPES[given.type])
            else:
                raise UnsupportedTarget(
                    f"{self.name}: the graph asks for {name}, which is not known here: known are "
                    f"{', '.join(known)} and past_key_values.*"
                )
        return feed

    def _empty_past(self, given: Any) -> list[int]:
        """``[1, heads, 0, head_dim]``, as far as the graph says; the config says the rest."""
        heads, _, width = given.shape[1:]
        width = width if isinstance(width, int) else self._head_dim
        if not isinstance(heads, int) or width is None:
            raise UnsupportedTarget(
                f"{self.name}: neither the graph nor a config.json says how wide the heads of "
                f"{given.name} are (its shape is {given.shape}): copy the model's config beside it"
            )
        return [1, heads, 0, width]


def _configs(folder: Path) -> dict[str, Any]:
    """What ``config.json`` and onnxruntime-genai's config say, in one; the first goes first."""
    merged: dict[str, Any] = {}
    for name in (GENAI_CONFIG, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read {path}: {error}") from error
        model = found.get("model", {})
        merged |= {**found, **model, **model.get("decoder", {}), **found.get("text_config", {})}
    return merged


def _number(config: dict[str, Any], names: Sequence[str]) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)


def _head_dim(config: dict[str, Any]) -> int | None:
    found = _number(config, ("head_dim", "head_size"))
    hidden = _number(config, ("hidden_size", "n_embd"))
    heads = _number(config, ("num_attention_heads", "n_head"))
    return found or (hidden // heads if hidden and heads else None)


def _context_tokens(folder: Path, config: dict[str, Any]) -> int:
    found = _number(config, ("max_position_embeddings", "n_positions", "context_length"))
    if found is None:
        raise SourceError(
            f"{folder} has no config.json or genai_config.json that says how long its context is: "
            "copy the model's own config beside it"
        )
    return found
