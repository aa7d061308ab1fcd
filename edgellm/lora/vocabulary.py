"""The tokenizer of a merged model: the base's, or the one that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter
from edgellm.source.matching import check_vocabulary
from edgellm.source.model import ModelSource
from edgellm.tokenization import Tokenizer, check_parity
from edgellm.tokenization.from_hf import TEMPLATE_FOLDER


@dataclass(frozen=True, slots=True)
class Notes:
    """Facts about the vocabulary: ``new`` ones, and those of the base that hold no longer."""

    new: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()


def settled_tokenizer(
    source: ModelSource, adapters: Sequence[Adapter], vocab_size: int
) -> tuple[Tokenizer, Notes]:
    """The tokenizer for ``source`` with ``adapters``, whose embedding has ``vocab_size`` rows.

    An adapter's own where it says something else than the base's: other tokens, or another chat
    template, which the adapter was trained to answer. Raises ``AdapterError`` for two adapters with
    different ones, and for tokens without a row in the embedding.
    """
    brought, giver, notes = brought_tokenizer(source.tokenizer, adapters)
    chosen = source.tokenizer if brought is None else _with_ends_of(source, brought)
    tokens = chosen.vocab_size
    check_rows(giver.name if giver else source.name, tokens, vocab_size)
    before = check_vocabulary(source.name, source.tokenizer.vocab_size, source.decoder.vocab_size)
    now = check_vocabulary(source.name, tokens, vocab_size)
    if vocab_size != source.decoder.vocab_size:
        notes.append(f"vocabulary of {source.decoder.vocab_size} rows resized to {vocab_size}")
    return chosen, Notes((*notes, *now), before)


def check_rows(owner: str, tokens: int, rows: int) -> None:
    """Raise ``AdapterError`` where ``owner``'s tokenizer has more tokens than there are rows."""
    if tokens > rows:
        raise AdapterError(
            f"{owner}: the tokenizer has token ids up to {tokens - 1} and the merged embedding "
            f"{rows} rows: the rows of the added tokens were not saved with the adapter; save it "
            "again with save_embedding_layers=True"
        )


def brought_tokenizer(
    ours: Tokenizer, adapters: Sequence[Adapter]
) -> tuple[Tokenizer | None, Adapter | None, list[str]]:
    """The tokenizer that an adapter brings instead of ``ours``, whose it is, and a note of it.

    None where no adapter's says something else. Raises ``AdapterError`` for two that differ.
    """
    chosen: Tokenizer | None = None
    giver: Adapter | None = None
    notes: list[str] = []
    for adapter in adapters:
        if adapter.tokenizer_folder is None:
            continue
        brought = Tokenizer.from_hf_folder(adapter.tokenizer_folder)
        difference = _difference(ours, brought)
        if not difference:
            continue
        if chosen is not None and giver is not None and _difference(chosen, brought):
            raise AdapterError(
                f"{giver.name} and {adapter.name} were trained with tokenizers that differ "
                f"({_difference(chosen, brought)}): merge one of them, or remove the tokenizer "
                "files of the one whose prompts you will not use from its folder"
            )
        chosen, giver = brought, adapter
        notes.append(f"tokenizer from {adapter.name}: {difference}")
        if brought.chat_template is None and ours.chat_template is not None:
            chosen = _with_templates(brought, ours.settings.chat_templates)
            notes.append(f"chat template from the base: {adapter.name} brings none")
    return chosen, giver, notes


def _difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    """What ``theirs`` says that ``ours`` does not, empty where that is nothing."""
    if theirs.backend.get_vocab(True) != ours.backend.get_vocab(True):
        added = theirs.backend.get_vocab(True).keys() - ours.backend.get_vocab(True).keys()
        return f"{len(added)} tokens added" if added else "other tokens"
    if not _same_rules(ours, theirs):
        return "text is split by other rules"
    if set(theirs.eos_token_ids) - set(ours.eos_token_ids):
        return "other tokens end an answer"
    if theirs.chat_template is not None and theirs.chat_template != ours.chat_template:
        return "another chat template"
    return ""


def _same_rules(ours: Tokenizer, theirs: Tokenizer) -> bool:
    return check_parity(ours, theirs, method="").equal


def _with_templates(tokenizer: Tokenizer, templates: Mapping[str, str]) -> Tokenizer:
    """``tokenizer`` with chat ``templates`` by name, in files as transformers saves them."""
    files = {
        "chat_template.jinja" if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja": text
        for name, text in templates.items()
    }
    return Tokenizer(
        tokenizer.backend,
        replace(tokenizer.settings, chat_templates=templates),
        source_files={
            **tokenizer.files(),
            **{name: text.encode() for name, text in files.items()},
        },
    )


def _with_ends_of(source: ModelSource, tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer``, also ending answers where the base's configs say, as its folder would.

    An adapter's folder has neither ``config.json`` nor ``generation_config.json``; see
    ``tokenization.from_hf``.
    """
    stated: Any = source.generation.get("eos_token_id") or source.config.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [stated]
    ids = [*tokenizer.eos_token_ids, *(end for end in ends if isinstance(end, int))]
    settings = replace(tokenizer.settings, eos_token_ids=tuple(dict.fromkeys(ids)))
    return Tokenizer(tokenizer.backend, settings, source_files=tokenizer.files())
