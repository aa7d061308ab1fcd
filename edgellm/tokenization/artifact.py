"""The tokenizer of something that can be run, and whether it is still the source's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tokenizers import models

from edgellm.errors import UnsupportedTokenizer
from edgellm.manifest import Parity
from edgellm.tokenization.llamacpp import LlamaCppTokenizer
from edgellm.tokenization.parity import Limit, check_parity, merged, with_mismatches
from edgellm.tokenization.tokenizer import Tokenizer


def artifact_tokenizer(main_file: Path, container: str) -> Tokenizer | LlamaCppTokenizer:
    """The tokenizer of a GGUF file, or of the folder around another container's main file.

    ``container`` decides, not the file's name: a GGUF file may have any. One whose tokenizer
    edgellm cannot rebuild is read by llama.cpp's own, where llama-cpp-python is installed;
    otherwise ``UnsupportedTokenizer`` is raised.
    """
    if container != "gguf":
        return Tokenizer.from_hf_folder(main_file.parent)
    from edgellm.source.gguf_file import read_gguf_model

    metadata = read_gguf_model(main_file).metadata
    try:
        return Tokenizer.from_gguf(metadata)
    except UnsupportedTokenizer:
        if _llamacpp_is_installed():
            return LlamaCppTokenizer(main_file)
        raise


def artifact_parity(
    source: Tokenizer, main_file: Path, container: str, limits: Sequence[Limit] = ()
) -> Parity:
    """Whether the artifact whose main file this is splits text as ``source`` does.

    And whether it ends answers at the same tokens and kept the chat template. By the tokenizer
    that edgellm reads back from it and, for a GGUF file where llama-cpp-python is installed, by
    llama.cpp's own as well; ``method`` says which were asked.
    ``limits``: what readers of the container are known to do differently.
    """
    found = _compared(
        source,
        artifact_tokenizer(main_file, container),
        "edgellm reading the artifact back",
        limits,
    )
    if container != "gguf" or not _llamacpp_is_installed():
        return found
    judge = LlamaCppTokenizer(main_file)
    try:
        return merged(found, _compared(source, judge, "llama.cpp's own tokenizer", limits))
    finally:
        judge.close()


def _compared(
    source: Tokenizer,
    artifact: Tokenizer | LlamaCppTokenizer,
    method: str,
    limits: Sequence[Limit],
) -> Parity:
    # Word lists do not say where spaces stood, and every reader puts its own.
    decodes = not isinstance(source.backend.model, models.WordPiece)
    found = check_parity(source, artifact, method=method, limits=limits, decodes=decodes)
    lost = [end for end in source.eos_token_ids if end not in artifact.eos_token_ids]
    more = [
        f"an answer ends at {source.backend.id_to_token(end)!r} ({end}), and in the artifact it "
        "goes on"
        for end in lost
    ]
    if (source.chat_template or "") != (artifact.chat_template or ""):
        more.append("the artifact has another chat template than the source")
    return with_mismatches(found, more)


def _llamacpp_is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None
