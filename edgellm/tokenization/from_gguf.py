"""A tokenizer out of a GGUF file's metadata, giving the ids that llama.cpp gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization.gguf_words import MARK
from edgellm.tokenization.pieces import SPACE, Pieces, add_cut_tokens, backend_of, bpe_model
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, build
from edgellm.tokenization.tokenizer import Settings, Tokenizer, add_surroundings
from edgellm.tokenization.vocabulary import (
    END_KEYS,
    END_TEXTS,
    ID_KEYS,
    PREFIX,
    TokenType,
    Vocabulary,
    read_vocabulary,
    string_list,
)

# What llama.cpp takes where the file says nothing (``llama_vocab::impl::load``).
_DEFAULT_IDS = {
    "gpt2": {"bos": 11, "eos": 11},
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
}
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
                   "lfm2", "jina-v5-nano", "tekken", "chameleon")  # fmt: skip
# Tokens of models whose <|end|> does not end an answer (gpt-oss, Solar Open).
_HARMONY = ({"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"})
_LONGEST_WORD = 1 << 20
_WAY_OUT = "run the file with --runtime llamacpp, which splits text by its own tokenizer"


def read(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in ``metadata``: see ``Tokenizer.from_gguf``."""
    kept = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    model = kept.get(PREFIX + "model")
    if model is None:
        raise SourceError(f"the GGUF file has no {PREFIX}model, so it holds no tokenizer")
    vocabulary = read_vocabulary(kept)
    settings = _settings(kept, str(model), vocabulary)
    if model == "gpt2":
        backend = _byte_level(kept, vocabulary)
    elif model == "llama":
        backend = _merged_pieces(kept, vocabulary, settings)
    elif model == "t5":
        backend = _likely_pieces(kept, vocabulary, settings)
    elif model == "bert":
        backend = _words(kept, vocabulary, settings)
    else:
        raise UnsupportedTokenizer(
            f"{PREFIX}model is {model!r}; edgellm can rebuild gpt2 (byte-level BPE), llama and t5 "
            f"(SentencePiece) and bert (WordPiece): {_WAY_OUT}"
        )
    add_surroundings(backend, settings.prefix_ids, settings.suffix_ids)
    return Tokenizer(backend, settings, source_metadata=kept)


def _settings(metadata: Mapping[str, Any], model: str, vocabulary: Vocabulary) -> Settings:
    count = len(vocabulary.tokens)
    special_ids = {
        name: token_id for name, token_id in _DEFAULT_IDS.get(model, {}).items() if token_id < count
    }
    for name, key in ID_KEYS.items():
        token_id = metadata.get(PREFIX + key)
        if token_id is not None and 0 <= int(token_id) < count:
            special_ids[name] = int(token_id)
    ends = [special_ids[name] for name in ("eos",) if name in special_ids]
    for key in END_KEYS:
        token_id = metadata.get(PREFIX + key)
        if token_id is not None and 0 <= int(token_id) < count:
            ends.append(int(token_id))
    ends += [
        index
        for index, kind in enumerate(vocabulary.stored_types)
        if kind == TokenType.CONTROL and vocabulary.tokens[index] in END_TEXTS
    ]
    texts = {vocabulary.tokens[index]: index for index in ends}
    if any(pair <= set(texts) for pair in _HARMONY):
        # There it ends a message of several that make an answer.
        ends = [index for index in ends if index != texts.get("<|end|>")]
    bos_by_default = model == "llama" or metadata.get(PREFIX + "pre") in _BOS_BY_DEFAULT
    wanted = [
        ("bos", metadata.get(PREFIX + "add_bos_token", bos_by_default)),
        ("eos", metadata.get(PREFIX + "add_eos_token", model == "t5")),
    ]
    if model == "bert":
        wanted = [("bos", True), ("sep", True)]
    around = [(special_ids[name],) if add and name in special_ids else () for name, add in wanted]
    templates = {
        key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": str(text)
        for key, text in metadata.items()
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    return Settings(
        special_ids=special_ids,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        prefix_ids=around[0],
        suffix_ids=around[1],
        chat_templates=templates,
    )


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> Backend:
    name = metadata.get(PREFIX + "pre", "default")
    row = PRE_TOKENIZERS.get(name)
    if row is None:
        raise UnsupportedTokenizer(
            f"the pre-tokenizer {name!r} ({PREFIX}pre) is not known here: {_WAY_OUT}"
        )
    merges = []
    for merge in string_list(metadata, "merges"):
        # A token never is a bare space, so the space that parts two is the first after one letter.
        cut = merge.find(" ", 1)
        if cut < 0:
            raise SourceError(
                f"{PREFIX}merges holds {merge!r}, which is no pair: the file is damaged"
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    backend = Backend(bpe_model(vocab, merges, f"{PREFIX}merges", ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = build(row.splits)
    backend.decoder = decoders.ByteLevel()
    add_cut_tokens(backend, vocabulary)
    return backend


def _merged_pieces(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, settings: Settings
) -> Backend:
    return backend_of(
        Pieces(
            vocabulary,
            unk_id=settings.special_ids.get("unk"),
            space_prefix=bool(metadata.get(PREFIX + "add_space_prefix", True)),
            where=f"{PREFIX}scores",
        )
    )


def _likely_pieces(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, settings: Settings
) -> Backend:
    squeezes = bool(metadata.get(PREFIX + "remove_extra_whitespaces", False))
    return backend_of(
        Pieces(
            vocabulary,
            unk_id=settings.special_ids.get("unk"),
            unigram=True,
            space_prefix=squeezes or bool(metadata.get(PREFIX + "add_space_prefix", False)),
            squeezes_spaces=squeezes,
            charsmap=bytes(metadata.get(PREFIX + "precompiled_charsmap", b"")),
            byte_fallback=False,
            where=f"the GGUF file ({PREFIX}*)",
        )
    )


def _words(metadata: Mapping[str, Any], vocabulary: Vocabulary, settings: Settings) -> Backend:
    vocab: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=False)):
        if kind == TokenType.NORMAL:
            token = token[1:] if token.startswith(SPACE) else MARK + token
        vocab[token] = index
    unk = settings.special_ids.get("unk")
    if unk is None or len(vocab) != len(vocabulary.tokens):
        raise SourceError(
            f"{PREFIX}tokens are no word list: "
            + ("no token stands for unknown words" if unk is None else "two of them are the same")
        )
    # A word of any length is cut, as llama.cpp does.
    model = models.WordPiece(
        vocab, unk_token=vocabulary.tokens[unk], max_input_chars_per_word=_LONGEST_WORD
    )
    backend = Backend(model)
    lower = bool(metadata.get(PREFIX + "normalizer.lowercase", True))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=bool(metadata.get(PREFIX + "normalizer.strip_accents", lower)),
        lowercase=lower,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=MARK, cleanup=False)
    add_cut_tokens(backend, vocabulary)
    return backend
