"""A tokenizer out of a GGUF file's metadata, giving the ids that llama.cpp gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, build
from edgellm.tokenization.tokenizer import Settings, Tokenizer
from edgellm.tokenization.vocabulary import (
    END_TEXTS,
    ID_KEYS,
    PREFIX,
    TokenType,
    Vocabulary,
    read_vocabulary,
    string_list,
)

SPACE = "▁"
# What llama.cpp takes where the file says nothing (``llama_vocab::impl::load``).
_DEFAULT_IDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2, "unk": 0}}
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
                   "lfm2", "tekken")  # fmt: skip
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
        backend = _sentencepiece(kept, vocabulary, settings)
    else:
        raise UnsupportedTokenizer(
            f"{PREFIX}model is {model!r}; edgellm can rebuild gpt2 (byte-level BPE) and llama "
            f"(SentencePiece BPE): {_WAY_OUT}"
        )
    _add_tokens(backend, vocabulary)
    _add_surroundings(backend, settings)
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
    for key in ("eot_token_id", "eom_token_id"):
        token_id = metadata.get(PREFIX + key)
        if token_id is not None and 0 <= int(token_id) < count:
            ends.append(int(token_id))
    ends += [
        index
        for index, kind in enumerate(vocabulary.stored_types)
        if kind == TokenType.CONTROL and vocabulary.tokens[index] in END_TEXTS
    ]
    bos_by_default = model == "llama" or metadata.get(PREFIX + "pre") in _BOS_BY_DEFAULT
    around = [
        (special_ids[name],) if add and name in special_ids else ()
        for name, add in (
            ("bos", metadata.get(PREFIX + "add_bos_token", bos_by_default)),
            ("eos", metadata.get(PREFIX + "add_eos_token", False)),
        )
    ]
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
    backend = Backend(_bpe(vocab, merges, ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = build(row.splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, settings: Settings
) -> Backend:
    """SentencePiece BPE: any two neighbours whose text is a token may merge, best score first."""
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    unk = settings.special_ids.get("unk")
    model = _bpe(
        vocab,
        _merges_by_score(vocabulary),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unk is None else vocabulary.tokens[unk],
    )
    backend = Backend(model)
    replace = normalizers.Replace(" ", SPACE)
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get(PREFIX + "add_space_prefix", True):
        # Run on each stretch of text between special tokens, so each gets its own space.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every split of every normal token into two, tokens of better score first.

    Among equals llama.cpp merges from left to right. For runs of one letter (Llama's spaces) that
    is what the longer left side first comes to; for anything else a list of merges cannot say it,
    and ``UnsupportedTokenizer`` is raised.
    """
    normal = vocabulary.of_type(TokenType.NORMAL)
    known = {vocabulary.tokens[index] for index in normal}
    splits: list[tuple[float, int, int, str]] = []
    whose: dict[float, str] = {}
    for index in normal:
        token, score = vocabulary.tokens[index], vocabulary.scores[index]
        cuts = [
            cut for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known
        ]
        if not cuts:
            continue
        equal = whose.setdefault(score, token)
        if equal is not token and len({*equal, *token}) > 1:
            raise UnsupportedTokenizer(
                f"{PREFIX}scores gives {equal!r} and {token!r} the same score {score}, so the "
                f"order of merges is lost (an older converter wrote this file): {_WAY_OUT}"
            )
        splits += [(-score, -cut, cut - len(token), token) for cut in cuts]
    splits.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in splits]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:
        # The library raises bare ``Exception`` and nothing narrower.
        if type(error) not in (Exception, ValueError):
            raise
        raise SourceError(f"{PREFIX}merges and {PREFIX}tokens do not fit: {error}") from error


def _add_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    """Tokens that are cut out of the text before anything else splits it."""
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    own = vocabulary.of_type(TokenType.USER_DEFINED)
    for ids, is_special in ((special, True), (own, False)):
        backend.add_tokens(
            [
                AddedToken(vocabulary.tokens[index], normalized=False, special=is_special)
                for index in ids
            ]
        )


def _add_surroundings(backend: Backend, settings: Settings) -> None:
    """A post-processor that says what ``settings`` say, for readers of the tokenizer.json."""
    ids = (*settings.prefix_ids, *settings.suffix_ids)
    if not ids:
        return
    names = {token_id: backend.id_to_token(token_id) for token_id in ids}
    before = [names[token_id] for token_id in settings.prefix_ids]
    after = [names[token_id] for token_id in settings.suffix_ids]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{name}:1" for name in before), "$B:1"],
        special_tokens=[(name, token_id) for token_id, name in names.items()],
    )
