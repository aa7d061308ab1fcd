"""Tokenizers of folders without a tokenizer.json, out of the files that it replaced.

What those files leave unsaid (how text is split before merging, which tokens are put around it) the
class of the tokenizer says, by its name in ``tokenizer_config.json`` or the model's type. The rows
follow ``transformers``' classes; a name without a row is refused, because any guess gives ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.json_file import read_json
from edgellm.tokenization import pieces_file, ranks
from edgellm.tokenization.added_tokens import add_missing, token_text
from edgellm.tokenization.languages import MBART, MBART50
from edgellm.tokenization.pieces import Pieces, backend_of, bpe_model
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, build
from edgellm.tokenization.tokenizer import SPECIAL_NAMES, add_surroundings
from edgellm.tokenization.vocabulary import TokenType, Vocabulary

WAY_OUT = (
    "with transformers and sentencepiece installed, "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one"
)
# The model's tokenizer may lie in any of these; the first that is there is read.
PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TEKKEN, GPT2_VOCAB, GPT2_MERGES, WORDS = "tekken.json", "vocab.json", "merges.txt", "vocab.txt"
ADDED = "added_tokens.json"

GENERIC = ("", "pretrained", "auto", "tokenizersbackend")
"""Names of classes, as ``_kind`` shortens them, that say nothing of what they do with text."""


@dataclass(frozen=True, slots=True)
class Built:
    """A tokenizer and what its class says where ``tokenizer_config.json`` says nothing."""

    backend: Backend
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a tokenizer class adds to its files.

    ``pre`` names a row of ``PRE_TOKENIZERS``; ``nfc``: accents are composed first. ``before`` and
    ``after`` a text stand the special tokens of those names, ``special`` are their texts where no
    config gives any, and ``extra`` the tokens behind those of the file. ``fairseq``: ids are those
    of fairseq, which has tokens of its own in front, and ``extra`` behind. ``class_name``: of the
    class whose rules go on applying.
    """

    pre: str = ""
    nfc: bool = False
    before: str = ""
    after: str = ""
    special: Mapping[str, str] | None = None
    extra: tuple[str, ...] = ()
    fairseq: bool = False
    class_name: str = ""


_GPT2 = _Kind("gpt-2", special=dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>"))
_QWEN2 = _Kind("qwen2", nfc=True, special={"eos_token": "<|endoftext|>"})
_QWEN = _Kind(
    "qwen2",
    nfc=True,
    special={"eos_token": "<|endoftext|>"},
    extra=(
        "<|endoftext|>", "<|im_start|>", "<|im_end|>",
        *(f"<|extra_{index}|>" for index in range(205)),
    ),
)  # fmt: skip
_LLAMA = _Kind(before="bos")
_T5 = _Kind(after="eos")
_T5_EXTRA_IDS = 100
_BERT = _Kind(
    before="cls",
    after="sep",
    special={f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")},
)
_MASK = "<mask>"
_FAIRSEQ = {
    **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
    **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
    "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": _MASK,
}  # fmt: skip
_XLM = _Kind(before="bos", after="eos", special=_FAIRSEQ, extra=(_MASK,), fairseq=True)
# What stands around a text depends on its language (``languages.mark``).
_MBART, _MBART50 = (
    _Kind(special=_FAIRSEQ, extra=(*codes, _MASK), fairseq=True, class_name=name)
    for codes, name in ((MBART, "MBartTokenizer"), (MBART50, "MBart50Tokenizer"))
)
# By the class's name less "Tokenizer" and "Fast", in small letters, or by the model's type.
_PIECE_KINDS = {
    **dict.fromkeys(
        ("llama", "codellama", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "phi3", "yi",
         "baichuan", "internlm", "internlm2", "internlm3", "minicpm"),
        _LLAMA,
    ),
    "t5": _T5,
    **dict.fromkeys(("mt5", "umt5"), _Kind(after="eos")),
    **dict.fromkeys(("xlmroberta", "xlm-roberta"), _XLM),
    "mbart": _MBART,
    "mbart50": _MBART50,
}  # fmt: skip
_MERGE_KINDS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "codegen", "phi"), _GPT2),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), _QWEN2),
}
# The class GPT2Tokenizer also stands before models with other rules in their tokenizer.json, for
# instance StarCoder2 and SmolLM, which take digits apart.
_TRUE_GPT2 = frozenset(("gpt2", "gpt_neo", "gptj", "opt", "codegen", "phi", ""))
_WORD_KINDS = dict.fromkeys(("bert", "distilbert", "electra", "mobilebert"), _BERT)
_RANK_KINDS = {"qwen": _QWEN, "llama": _Kind("llama-bpe", before="bos")}


def read(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> Built | None:
    """The tokenizer in ``folder``'s older files, None when it has none of them.

    ``config`` is its tokenizer's, ``model`` its model's, each empty when there is no such file.
    Raises ``UnsupportedTokenizer`` for a class without a row here, ``SourceError`` for damage.
    """
    for name in PIECE_FILES:
        if (folder / name).is_file():
            data = _bytes(folder / name)
            if ranks.is_tiktoken(data):
                return _tiktoken(folder / name, data, config, model)
            return _pieces(folder / name, data, config, model)
    if (folder / TEKKEN).is_file():
        return _tekken(folder / TEKKEN, config)
    for path in [*sorted(folder.glob("*.tiktoken")), folder / "tiktoken.model"]:
        if path.is_file():
            return _tiktoken(path, _bytes(path), config, model)
    if (folder / GPT2_VOCAB).is_file():
        return _merges(folder, config, model)
    if (folder / WORDS).is_file():
        return _words(folder / WORDS, config, model)
    return None


def _pieces(path: Path, data: bytes, config: Mapping[str, Any], model: Mapping[str, Any]) -> Built:
    kind = _kind(_PIECE_KINDS, path, config, model)
    found = pieces_file.parse(data, str(path))
    texts = found.pieces.vocabulary.tokens
    pieces = _as_fairseq(found.pieces, kind.extra) if kind.fairseq else found.pieces
    # transformers writes whether a space comes behind each special token, too ("legacy"); folders
    # older than that key were made with it.
    backend = backend_of(replace(pieces, prefixes_once=config.get("legacy") is False))
    if kind.fairseq:
        backend.add_special_tokens([AddedToken(_MASK, lstrip=True, normalized=False)])
    special = {f"{name}_token": texts[index] for name, index in found.special_ids.items()}
    if kind is _T5 and not config.get("added_tokens_decoder"):
        count = config.get("extra_ids", _T5_EXTRA_IDS)
        extra = [f"<extra_id_{index}>" for index in reversed(range(int(count)))]
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in extra])
    class_name = {"tokenizer_class": kind.class_name} if kind.class_name else {}
    return _finished(backend, kind, path.parent, {**special, **config, **class_name})


def _as_fairseq(pieces: Pieces, behind: Sequence[str]) -> Pieces:
    """``pieces`` with fairseq's ids: four tokens of its own, and the file's but the first three.

    The mask is left to the caller: a space before it belongs to it.
    """
    old = pieces.vocabulary
    own = ("<s>", "<pad>", "</s>", "<unk>")
    control, unused = int(TokenType.CONTROL), int(TokenType.UNUSED)
    types = [
        *(control, control, control, int(TokenType.UNKNOWN)),
        *old.types[3:],
        *(unused if text == _MASK else control for text in behind),
    ]
    scores = [*(0.0 for _ in own), *old.scores[3:], *(0.0 for _ in behind)]
    vocabulary = Vocabulary((*own, *old.tokens[3:], *behind), types, types, scores)
    return replace(pieces, vocabulary=vocabulary, unk_id=own.index("<unk>"))


def _merges(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> Built:
    path = folder / GPT2_MERGES
    if not path.is_file():
        raise SourceError(f"{folder} has {GPT2_VOCAB} and no {GPT2_MERGES}: fetch both again")
    kind = _kind(_MERGE_KINDS, folder / GPT2_VOCAB, config, model)
    if kind is _GPT2 and model.get("model_type", "") not in _TRUE_GPT2:
        raise UnsupportedTokenizer(
            f"{folder} holds GPT-2's {GPT2_VOCAB} and {GPT2_MERGES} for a model of type "
            f"{model['model_type']!r}, and those do not say how such a model takes text apart "
            f"before merging: fetch its tokenizer.json, which does"
        )
    vocab = read_json(folder / GPT2_VOCAB)
    if not all(isinstance(index, int) for index in vocab.values()):
        raise SourceError(f"{folder / GPT2_VOCAB} is not an object of ids by token: fetch it again")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise SourceError(
                f"{path}, line {number} is {line[:60]!r}, not two tokens with a space between: "
                "fetch it again"
            )
        merges.append((parts[0], parts[1]))
    backend = _byte_level(vocab, merges, kind, str(path))
    return _finished(backend, kind, folder, config)


def _tiktoken(
    path: Path, data: bytes, config: Mapping[str, Any], model: Mapping[str, Any]
) -> Built:
    kind = _kind(_RANK_KINDS, path, config, model)
    ranked = ranks.read_tiktoken(data, str(path))
    if not kind.extra and not config.get("added_tokens_decoder"):
        raise UnsupportedTokenizer(
            f"{path} holds no special tokens, and no added_tokens_decoder in "
            f"tokenizer_config.json gives them: fetch that file, or a tokenizer.json ({WAY_OUT})"
        )
    vocab, merges = _ranked(ranked, ())
    backend = _byte_level(vocab, merges, kind, str(path), ignore_merges=True)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in kind.extra])
    return _finished(backend, kind, path.parent, config)


def _tekken(path: Path, config: Mapping[str, Any]) -> Built:
    found = ranks.read_tekken(_bytes(path), str(path))
    vocab, merges = _ranked(found.ranked, found.special)
    kind = _Kind(before="bos")
    backend = Backend(bpe_model(vocab, merges, str(path), ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(found.pattern), "isolated")
    except Exception as error:
        # The library raises bare ``Exception`` and nothing narrower.
        if type(error) not in (Exception, ValueError):
            raise
        raise SourceError(f"{path}: its pattern is no regular expression: {error}") from error
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in found.special])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _finished(backend, kind, path.parent, {**special, **config})


def _words(path: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> Built:
    kind = _kind(_WORD_KINDS, path, config, model)
    vocab = {word: index for index, word in enumerate(_lines(path)) if word}
    config = {**(kind.special or {}), **config}
    unk = token_text(config["unk_token"])
    if unk not in vocab:
        raise SourceError(f"{path} does not hold its unknown token {unk!r}: fetch it again")
    backend = Backend(models.WordPiece(vocab, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    named = [token_text(config.get(f"{name}_token")) for name in SPECIAL_NAMES]
    if missing := [text for text in named if text and text not in vocab]:
        raise SourceError(
            f"{path} has no {', '.join(missing)}, which are special tokens of the tokenizer: it "
            "belongs to another model, or is cut short; fetch it again"
        )
    built = _finished(backend, kind, path.parent, config)
    if config.get("add_bos_token") is not False and config.get("add_eos_token") is not False:
        # As it is for a text alone, and for two.
        before, after = (token_text(built.config[f"{name}_token"]) for name in ("cls", "sep"))
        built.backend.post_processor = processors.TemplateProcessing(
            single=f"{before}:0 $A:0 {after}:0",
            pair=f"{before}:0 $A:0 {after}:0 $B:1 {after}:1",
            special_tokens=[(text, vocab[text]) for text in (before, after) if text],
        )
    return built


def _byte_level(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    kind: _Kind,
    where: str,
    *,
    ignore_merges: bool = False,
) -> Backend:
    backend = Backend(bpe_model(vocab, merges, where, ignore_merges=ignore_merges))
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = build(PRE_TOKENIZERS[kind.pre].splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def _ranked(
    ranked: Sequence[bytes], special: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in GPT-2's letters, ids beginning behind the special tokens."""
    texts = {token: ranks.letters(token) for token in ranked}
    vocab = {text: index for index, text in enumerate((*special, *texts.values()))}
    merges = [(texts[left], texts[right]) for left, right in ranks.merges_by_rank(ranked)]
    return vocab, merges


def _finished(backend: Backend, kind: _Kind, folder: Path, config: Mapping[str, Any]) -> Built:
    """With the special tokens of ``config`` cut out of text, and put around it as ``kind`` says."""
    config = {**(kind.special or {}), **config}
    _add_tokens(backend, folder, config)
    add_missing(backend, config, folder)
    around: list[tuple[int, ...]] = []
    for name, flag, by_default in (
        (kind.before or "bos", "add_bos_token", bool(kind.before)),
        (kind.after or "eos", "add_eos_token", bool(kind.after)),
    ):
        text = token_text(config.get(f"{name}_token"))
        token_id = None if text is None else backend.token_to_id(text)
        wanted = config.get(flag)
        wanted = by_default if wanted is None else bool(wanted)
        if wanted and token_id is None:
            raise SourceError(
                f"{folder}: the tokenizer puts its {name} token around a text, and "
                f"tokenizer_config.json names {text!r} for it, which is no token: fetch it again"
            )
        around.append((token_id,) if wanted and token_id is not None else ())
    add_surroundings(backend, around[0], around[1])
    return Built(backend, config)


def _add_tokens(backend: Backend, folder: Path, config: Mapping[str, Any]) -> None:
    """Special tokens by name, then those of added_tokens.json at the ids that it gives them."""
    named = [token_text(config.get(f"{name}_token")) for name in SPECIAL_NAMES]
    more = config.get("additional_special_tokens") or ()
    named += [token_text(token) for token in (more if isinstance(more, list) else ())]
    known = [text for text in named if text and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in known])
    path = folder / ADDED
    if not path.is_file():
        return
    added = read_json(path)
    if not all(isinstance(index, int) for index in added.values()):
        raise SourceError(f"{path} is not an object of ids by token: fetch it again")
    for text, index in sorted(added.items(), key=lambda item: item[1]):
        special = text in named
        backend.add_tokens([AddedToken(text, normalized=False, special=special)])
        if backend.token_to_id(text) != index:
            raise SourceError(
                f"{path} gives the token {text!r} the id {index}, where the next free one is "
                f"{backend.token_to_id(text)}: its vocabulary is another one"
            )


def _kind(
    rows: Mapping[str, _Kind], path: Path, config: Mapping[str, Any], model: Mapping[str, Any]
) -> _Kind:
    """The row of the tokenizer's class, or failing that of the model's type."""
    cls = str(config.get("tokenizer_class") or "")
    name = cls.removesuffix("Fast").removesuffix("Tokenizer").lower()
    kind = name if name not in GENERIC else str(model.get("model_type") or "")
    if kind in rows:
        return rows[kind]
    said = cls or "no tokenizer_class"
    raise UnsupportedTokenizer(
        f"{path.parent} holds its tokenizer as {path.name} and has no tokenizer.json; its "
        f"tokenizer_config.json names {said}, and what that class does with text beside "
        f"{path.name} is not known here (it is for {', '.join(sorted(rows))}). Take a "
        f"tokenizer.json: {WAY_OUT}"
    )


def _lines(path: Path) -> list[str]:
    try:
        # By "\n" alone: other line ends of Unicode are tokens.
        return [line.removesuffix("\r") for line in _bytes(path).decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: {error}: fetch it again") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
