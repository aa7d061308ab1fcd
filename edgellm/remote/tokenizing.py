"""A tokenizer with the ids that a model's own Python gives, proven text by text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from edgellm.errors import EdgeError, UnsupportedTokenizer
from edgellm.remote.finding import OPTION, TOKENIZER, RemoteCode
from edgellm.remote.loading import LOADING_ERRORS, load_tokenizer
from edgellm.tokenization import Tokenizer, from_hf
from edgellm.tokenization.parity import cases
from edgellm.tokenization.tokenizer import enclosed

KNOWN_CLASSES: Final = (
    "LlamaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer",
    "QWenTokenizer", "BertTokenizer",
)  # fmt: skip
"""Classes whose rules an unknown one may have, for the files that lie there."""

PROBE: Final = "a"


def trusted_tokenizer(folder: Path, code: RemoteCode) -> Tokenizer:
    """The tokenizer of ``folder`` that gives the ids of its own Python, ``code``, which is run.

    It is the one that the files describe, the Python's own fast one, or its older files by the
    rules of a class that edgellm knows: the first that equals it on every awkward text. Raises
    ``UnsupportedTokenizer`` with an example where none does, and what ``load_tokenizer`` raises.
    """
    theirs = load_tokenizer(code)
    first = ""
    for what, tokenizer in _candidates(folder, theirs):
        difference = _difference(theirs, tokenizer)
        if not difference:
            return tokenizer
        first = first or f"{what}: {difference}"
    raise UnsupportedTokenizer(
        f"{folder}: {code.classes[TOKENIZER]}, the model's own Python, splits text as nothing does "
        f"that edgellm can build of its files ({first or 'it has no files that are known'}): take "
        f"a model with a tokenizer.json. {OPTION} runs that Python to compare with, it cannot put "
        "it into what is made"
    )


def _candidates(folder: Path, theirs: Any) -> Iterator[tuple[str, Tokenizer]]:
    """Tokenizers that may be ``theirs``, and what each is."""
    said: dict[str, Any] = {name: str(text) for name, text in theirs.special_tokens_map.items()
                            if isinstance(text, str)}  # fmt: skip
    around = _around(theirs)
    fast = getattr(theirs, "backend_tokenizer", None)
    with contextlib.suppress(EdgeError):  # which is why there is a Python of its own
        yield "its files", Tokenizer.from_hf_folder(folder)
    if fast is not None:
        backend = from_hf.parse(fast.to_str().encode(), "the model's own fast tokenizer")
        yield "its own fast tokenizer", from_hf.read(folder, backend=backend, said=said)
    for name in KNOWN_CLASSES:
        try:
            read = from_hf.read(
                folder, said={**said, "tokenizer_class": name}, around=around, older=True
            )
        except EdgeError:
            continue  # it takes other files
        yield f"its files as {name}", read


def _around(theirs: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that it puts before and behind a text; None where it does something else."""
    bare = list(theirs.encode(PROBE, add_special_tokens=False))
    whole = list(theirs.encode(PROBE))
    return enclosed(bare, whole)


def _difference(theirs: Any, ours: Tokenizer) -> str:
    """The first text that both take apart or put together differently; empty for none."""
    for text in dict.fromkeys(cases(ours.special_texts)):
        for special in (False, True):
            try:
                wanted = list(theirs.encode(text, add_special_tokens=special))
            except LOADING_ERRORS as error:
                return f"its Python fails on {text[:60]!r} ({type(error).__name__}: {error})"
            found = ours.encode(text, add_special=special)
            if found != wanted:
                return f"{text[:60]!r} is {found[:12]} and its Python gives {wanted[:12]}"
        back = theirs.decode(wanted, skip_special_tokens=True)
        if ours.decode(wanted).strip() != str(back).strip():
            return f"the ids of {text[:60]!r} are {ours.decode(wanted)[:60]!r} and {back[:60]!r}"
    return ""
