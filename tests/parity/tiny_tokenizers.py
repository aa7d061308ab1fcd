"""Small tokenizers trained on awkward text, in the shapes that published models have."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from edgellm.tokenization import AWKWARD_TEXTS

# Pre-tokenizers as published tokenizer.json files write them, by the name that llama.cpp has.
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALISED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}|"
)
PUBLISHED: dict[str, list[str]] = {
    "llama-bpe": [_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL],
    "qwen2": [_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL],
    "tekken": [_CAPITALISED.replace("{end}", "") + r"\p{N}|" + _SLASH_TAIL],
    "gpt-4o": [_CAPITALISED.replace("{end}", _CONTRACTION + "?") + r"\p{N}{1,3}|" + _SLASH_TAIL],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
_TIKTOKEN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
PUBLISHED |= {
    "cl100k": [_TIKTOKEN],
    "dolma2": [_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL],
    "qwen35": [
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "bloom": [r" ?[^(\s|[.,!?…。，、।۔،])]+"],
}
PIECES = (
    "a", "b", "Z", "é", "É", "ß", "ж", "Ж", "中", "文", "の", "한", "क", "ि", "\u0301", "ب", "1",
    "2", "७", "２", "½", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'", "'s", "'LL",
    "’", ".", ",", "!", "/", "-", "_", "(", "$", "+", "<", "`", "。", "“", "€", "🙂", "\u200d",
    "word", "Word", "ABc", "2024",
)  # fmt: skip
CONTROL = ("<s>", "</s>", "<|im_start|>")


def falcon() -> pre_tokenizers.PreTokenizer:
    """Falcon's pre-tokenizer: it takes bytes for letters before it looks for digits."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def random_texts(count: int, seed: int, extra: Sequence[str] = ()) -> list[str]:
    """Texts in which every kind of character meets every other."""
    choose = random.Random(seed)
    return [
        "".join(choose.choices((*PIECES, *extra), k=choose.randint(1, 20))) for _ in range(count)
    ]


def published_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of models that llama.cpp knows as ``name``, as their files write it."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in PUBLISHED[name]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    *,
    vocab_size: int = 3000,
    borders: bool = False,
) -> tokenizers.Tokenizer:
    """Byte-level BPE; its merges know no borders, so every split that is wrong shows in the ids.

    ``borders``: no merge crosses a split of ``pre_tokenizer``, as in a vocabulary trained with it.
    """
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer if borders and pre_tokenizer else whole
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    backend.train_from_iterator([*AWKWARD_TEXTS, *random_texts(700, 1)], trainer)
    backend.pre_tokenizer = pre_tokenizer or published_pre_tokenizer("gpt-2")
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(*, space_prefix: bool = True, vocab_size: int = 2500) -> tokenizers.Tokenizer:
    """SentencePiece BPE as transformers converts it: byte fallback, every split of every piece."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    # Special tokens and NUL kept out, as in real training text.
    marked = ("<s>", "</s>", "<|", "\0")
    corpus = [
        text
        for text in [*AWKWARD_TEXTS, *random_texts(700, 2)]
        if not any(mark in text for mark in marked)
    ]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, min_frequency=1)
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))
    letters = [token for token in model["vocab"] if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*tokens, *merged, *letters])}
    merges = [
        (token[:cut], token[cut:])
        for token in merged
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    replace = normalizers.Replace(" ", "▁")
    prepend = normalizers.Prepend("▁")
    backend.normalizer = normalizers.Sequence([prepend, replace]) if space_prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", *CONTROL)])
    backend.add_tokens([AddedToken("own  token", normalized=False)])
    return backend


def sentencepiece_file(
    kind: str, *, vocab_size: int = 900, corpus: Sequence[str] = (), **options: Any
) -> bytes:
    """A tokenizer.model that SentencePiece itself trained, on awkward texts where no ``corpus`` is
    given; ``kind`` is bpe or unigram."""
    import sentencepiece as library

    marked = ("<s>", "</s>", "\0")
    corpus = corpus or [
        text
        for text in [*AWKWARD_TEXTS, *random_texts(700, 2)]
        if not any(mark in text for mark in marked)
    ]
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=written,
        model_type=kind,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return written.getvalue()


def word_list(*, vocab_size: int = 900) -> bytes:
    """A vocab.txt that the WordPiece trainer made."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, min_frequency=1
    )
    # As BERT's normalizer leaves them: no control characters.
    texts = [text.replace("\0", "") for text in [*AWKWARD_TEXTS, *random_texts(300, 6)]]
    backend.train_from_iterator(texts, trainer)
    vocab = backend.get_vocab()
    return "\n".join([*sorted(vocab, key=vocab.__getitem__), ""]).encode()


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF file with metadata only, which llama.cpp loads as a vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def slow_folder(path: Path, **files: bytes | dict[str, Any]) -> Path:
    """A folder of ``files`` by name, a dot written ``__``; objects are written as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def changed(backend: tokenizers.Tokenizer, **parts: Any) -> tokenizers.Tokenizer:
    """A copy with parts of its tokenizer.json replaced; ``model`` is merged into the old one."""
    rules = json.loads(backend.to_str())
    rules["model"].update(parts.pop("model", {}))
    rules.update(parts)
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def write_folder(
    path: Path,
    backend: tokenizers.Tokenizer,
    settings: dict[str, Any] | None = None,
    **files: dict[str, Any],
) -> Path:
    """A Hugging Face folder: tokenizer.json, ``settings`` as its config, other JSON ``files``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    if settings is None:
        settings = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, content in {"tokenizer_config": settings, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path
