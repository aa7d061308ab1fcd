"""What sentence-transformers does around an encoder, as ``modules.json`` and its kin say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from edgellm.architectures.config import Config
from edgellm.architectures.encoder import Activation
from edgellm.errors import SourceError, UnsupportedModel
from edgellm.json_file import read_json

MODULES: Final = "modules.json"
SETTINGS: Final = "config_sentence_transformers.json"
POOLING_CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"

TEXT_FORWARD: Final = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How sentence-transformers says that the vectors are the last layer's."""

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len"]

FLAGS: Final[Mapping[str, Pooling]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
"""In the order in which sentence-transformers puts the vectors side by side where several are on.
"""

NAMES: Final[Mapping[str, Pooling]] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}
"""What sentence-transformers calls them from version 6 on."""

OTHER_FLAGS: Final = ("pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")


ACTIVATIONS: Final[Mapping[str, Activation | None]] = {
    "torch.nn.modules.linear.Identity": None,
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
}
"""torch's classes that a Dense may end with."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A product behind the pooling, with its bias and what it ends with.

    ``file`` holds its tensors, ``linear.weight`` ``[out, into]`` and ``linear.bias``.
    """

    out: int
    into: int
    biased: bool
    activation: Activation | None
    file: Path


@dataclass(frozen=True, slots=True)
class SentencePipeline:
    """How the vectors of a text's tokens become its embedding.

    ``pooling``: one vector of each kind, side by side, which go through each product of ``dense``.
    ``normalize``: to length 1. ``lowercase``:
    of the text, before its tokenizer sees it. ``prompts`` by name are put before a text;
    ``default_prompt`` names the one that is where nothing is said.
    """

    pooling: tuple[Pooling, ...] = ("mean",)
    normalize: bool = False
    dense: tuple[Dense, ...] = ()
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def embedding_size(self, hidden_size: int) -> int:
        """Values of an embedding, of vectors of ``hidden_size``."""
        return self.dense[-1].out if self.dense else hidden_size * len(self.pooling)


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """What a folder of sentence-transformers holds.

    ``model``: where the encoder lies, the folder itself or one in it. ``max_tokens``: None where
    the folder says none. ``files`` by relative path, as they are.
    """

    pipeline: SentencePipeline
    model: Path
    max_tokens: int | None
    files: dict[str, bytes]


def read_pipeline(folder: Path) -> PipelineFolder | None:
    """What sentence-transformers would do with ``folder``; None where it is none of its own.

    Raises ``UnsupportedModel`` for modules and settings that edgellm does not compute.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _modules(folder / MODULES)
    kinds = [kind for kind, _ in modules]
    normalized = kinds[-1:] == ["Normalize"]
    between = kinds[2 : len(kinds) - normalized]
    if kinds[:2] != ["Transformer", "Pooling"] or set(between) - {"Dense"}:
        raise UnsupportedModel(
            f"{folder / MODULES} lists {', '.join(kinds)}, and edgellm computes Transformer, "
            "Pooling and, if they are there, Dense and Normalize, in this order: convert the "
            "folder of the Transformer alone (without modules.json), and compute the rest on its "
            "last_hidden_state"
        )
    model, pooling = folder / modules[0][1], folder / modules[1][1] / POOLING_CONFIG
    normalize = folder / modules[-1][1] / POOLING_CONFIG
    if normalized and normalize.is_file():
        settings = _tracked(normalize)
        for key in ("module_input_name", "module_output_name"):
            settings.neutral(key, "sentence_embedding")
        settings.refuse_unread()
    prompts, default_prompt = _prompts(folder / SETTINGS)
    inner = sorted(model.glob("sentence_*_config.json"))
    max_tokens, lowercase = _transformer(inner[0]) if inner else (None, False)
    around = [folder / at / POOLING_CONFIG for _, at in modules[2:]]
    kept = [folder / MODULES, pooling, *around, folder / SETTINGS, *inner[:1]]
    return PipelineFolder(
        SentencePipeline(
            _pooling(pooling, prompts),
            normalized,
            tuple(_dense(folder / at) for kind, at in modules if kind == "Dense"),
            lowercase,
            prompts,
            default_prompt,
        ),
        model,
        max_tokens,
        {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in kept
            if file.is_file() and model == folder
        },
    )


def _modules(path: Path) -> list[tuple[str, str]]:
    """The kinds of the modules in order, and the folder of each."""
    try:
        listed = json.loads(path.read_bytes())
        found = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a list of modules ({error}): fetch it again") from error
    for _, inner in found:
        if Path(inner).is_absolute() or ".." in Path(inner).parts:
            raise SourceError(f"{path} names a folder outside its own: {inner!r}; it is unsafe")
    return found


def _tracked(path: Path) -> Config:
    return Config(read_json(path), where=str(path), harmless=(), neutral={})


def _pooling(path: Path, prompts: Mapping[str, str]) -> tuple[Pooling, ...]:
    if not path.is_file():
        raise SourceError(f"{path} is missing, which says how token vectors become one: fetch it")
    config = _tracked(path)
    config.skip("word_embedding_dimension", "embedding_dimension")
    for flag in OTHER_FLAGS:
        config.neutral(flag, False)
    # A prompt's own tokens are then left out of the mean.
    config.neutral("include_prompt", True, *(() if prompts else (False,)))
    chosen = [kind for flag, kind in FLAGS.items() if config.flag(flag, False)]
    if config.has("pooling_mode"):  # which goes before the flags there too
        listed = config.lists("pooling_mode")
        named = config.texts("pooling_mode") if listed else (config.text("pooling_mode"),)
        for name in named:
            if name not in NAMES:
                raise config.refusal("pooling_mode", name, f"one of {', '.join(NAMES)}")
        chosen = [NAMES[name] for name in named]
    config.refuse_unread()
    if not chosen:
        raise UnsupportedModel(
            f"{path} switches no way of pooling on that edgellm computes: "
            f"{', '.join(FLAGS.values())}"
        )
    return tuple(dict.fromkeys(chosen))


def _dense(folder: Path) -> Dense:
    """The product that lies in ``folder``; its weights are not looked at."""
    path, file = folder / POOLING_CONFIG, folder / WEIGHTS
    if not path.is_file() or not file.is_file():
        raise SourceError(
            f"{folder} lacks {POOLING_CONFIG} or {WEIGHTS}, which make a Dense module: fetch them, "
            "or save the model again with sentence-transformers"
        )
    config = _tracked(path)
    for key in ("module_input_name", "module_output_name"):
        config.neutral(key, "sentence_embedding")
    config.neutral("use_residual", False)
    found = Dense(
        out=config.integer("out_features"),
        into=config.integer("in_features"),
        biased=config.flag("bias", True),
        activation=config.choice("activation_function", ACTIVATIONS),
        file=file,
    )
    config.refuse_unread()
    return found


def _transformer(path: Path) -> tuple[int | None, bool]:
    """``max_seq_length``, and whether texts are put in lower case before the tokenizer."""
    config = _tracked(path)
    length = config.integer("max_seq_length") if config.has("max_seq_length") else None
    lowercase = config.flag("do_lower_case", False)
    config.skip("unpad_inputs")
    config.neutral("transformer_task", "feature-extraction")
    config.neutral("module_output_name", "token_embeddings")
    config.neutral("modality_config", {"text": TEXT_FORWARD})
    config.neutral("processing_kwargs", {})
    config.refuse_unread()
    return length, lowercase


def _prompts(path: Path) -> tuple[dict[str, str], str]:
    """Prompts by name, and the name of the one that is the default, or nothing."""
    if not path.is_file():
        return {}, ""
    config = _tracked(path)
    config.skip("__version__", "similarity_fn_name", "model_type")
    named = config.mapping("prompts") if config.has("prompts") else {}
    default = config.text("default_prompt_name", "")
    config.refuse_unread()
    if default and default not in named:
        raise SourceError(f"{path}: default_prompt_name is {default!r}, and prompts has none such")
    prompts = {name: str(text) for name, text in named.items() if text}
    return prompts, default if default in prompts else ""
