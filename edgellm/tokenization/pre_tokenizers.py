"""The pre-tokenizers that a GGUF file can name, as splits that the ``tokenizers`` library runs.

A GGUF file holds no pre-tokenizer, only its name (``tokenizer.ggml.pre``); llama.cpp holds a list
of regular expressions for each (``src/llama-vocab.cpp``, ``llm_tokenizer_bpe``), applied one after
the other, each within the pieces of the one before. The rows below say the same in Oniguruma's
syntax. A name that is missing here is one that llama.cpp does by code of its own (``kimi-k2``,
``afmoe``, ``tiny_aya``), by matches without text (``superbpe``) or not on bytes (``gemma4``,
``whitespace``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

# GPT-2's expression; ``pre_tokenizers.ByteLevel`` has it built in.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGIT = r"\p{N}"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _words(
    number: str, symbol_tail: str = r"[\r\n]*", contraction: str = _CONTRACTION + "|"
) -> str:
    """The expression that most models since GPT-4 share; they differ in how digits are grouped."""
    return (
        rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{symbol_tail}|{_SPACES}"
    )


def _cased(upper: str, lower: str, number: str, contraction: str = "") -> str:
    """The expression of tekken and GPT-4o: a word is capitals, then small letters."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contraction}"
        rf"|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama.cpp knows the case of ASCII letters only, and leaves combining marks out.
_UPPER_LLAMACPP = r"(?:(?=\p{L})[^a-z])"
_LOWER_LLAMACPP = r"(?:(?=\p{L})[^A-Z])"

# Letters with case, less the alphabets that the models' own list of ranges leaves out.
_DEEPSEEK_LETTERS = (
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}"
    r"\x{A790}-\x{A7FF}\x{AB30}-\x{AB6F}\x{10570}-\x{105FF}\x{10D50}-\x{10D8F}\x{16E40}-\x{16E7F}"
    r"\x{1D400}-\x{1DFFF}]]+"
)
_DEEPSEEK_SYMBOLS = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-\x{D7FF}]+"
# Both ranges hold spaces of other scripts, which llama.cpp has made a vertical tab by then.
_DEEPSEEK_SYMBOLS_LLAMACPP = _DEEPSEEK_SYMBOLS.replace("]", r"&&[^\s]]")
_DEEPSEEK_CJK_LLAMACPP = _DEEPSEEK_CJK.replace("]", r"&&[^\s]]")


def _deepseek(symbols: str, cjk: str, number: str) -> tuple[str, ...]:
    """The splits of DeepSeek LLM: lines, words, symbols, trailing spaces, CJK, numbers."""
    return ("[\r\n]", _DEEPSEEK_LETTERS, symbols, r"\s+$", cjk, number)


_DEEPSEEK3_WORDS = (
    _ASCII_PUNCTUATION
    + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class Nearness:
    """Where a row of llama.cpp's only comes near the models' own: for ``what``, in which texts."""

    what: str
    concerns: Callable[[str], bool]


_CASED_OR_MARK = frozenset(("Lu", "Lt", "Ll", "Mn", "Mc", "Me"))


def _has_case_or_marks(text: str) -> bool:
    return any(
        character > "\x7f" and unicodedata.category(character) in _CASED_OR_MARK
        for character in text
    )


_CASE_AND_MARKS = Nearness(
    "capital and small letters outside ASCII and combining marks", _has_case_or_marks
)
_CAPITALS = Nearness(
    "capitals within words and combining marks",
    lambda text: _has_case_or_marks(text) or not text.islower(),
)
_OTHER_SPACES = Nearness(
    "spaces outside ASCII",
    lambda text: any(character > "\x7f" and character.isspace() for character in text),
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What llama.cpp does for a name: ``splits`` in turn, then GPT-2's bytes-as-letters alphabet.

    ``ignore_merges``: a piece that is itself a token is taken whole, whatever the merges say.
    ``trained_splits``: what the models of that name were trained with, where llama.cpp only comes
    near it, ``near`` saying for what; empty where it is exact.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    trained_splits: tuple[str, ...] = ()
    near: Nearness | None = None


_GPT2_ROW = PreTokenizer((_GPT2,))
_DIGITS_GPT2 = PreTokenizer((_DIGIT, _GPT2))
_LLAMA3 = _words(r"\p{N}{1,3}")
_LLAMA3_ROW = PreTokenizer((_LLAMA3,), ignore_merges=True)
_LLAMA3_MERGED_ROW = PreTokenizer((_LLAMA3,))
_QWEN2_ROW = PreTokenizer((_words(_DIGIT),))
_DEEPSEEK3_ROW = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS))
_GPT4O_ROW = PreTokenizer(
    (_cased(_UPPER_LLAMACPP, _LOWER_LLAMACPP, r"\p{N}{1,3}", _CONTRACTION + "?"),),
    trained_splits=(_cased(_UPPER, _LOWER, r"\p{N}{1,3}", _CONTRACTION + "?"),),
    near=_CASE_AND_MARKS,
)
_BLOOM_ROW = PreTokenizer((_BLOOM,))
_YOUTU_SCRIPTS = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK
# To llama.cpp's general engine every letter is of every case.
_ANY_CASE = r"[\p{L}\p{M}]"
_SPACES_BY_HALVES = "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
_BAILING_ROW = PreTokenizer(
    (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)

# Where several names mean the same, the first is the one that ``name_of`` answers.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2_ROW,
    "llama-bpe": _LLAMA3_ROW,
    "qwen2": _QWEN2_ROW,
    "smollm": _DIGITS_GPT2,
    "tekken": PreTokenizer(
        (_cased(_UPPER_LLAMACPP, _LOWER_LLAMACPP, _DIGIT),),
        ignore_merges=True,
        trained_splits=(_cased(_UPPER, _LOWER, _DIGIT),),
        near=_CASE_AND_MARKS,
    ),
    "gpt-4o": _GPT4O_ROW,
    "deepseek-v3": _DEEPSEEK3_ROW,
    "deepseek-llm": PreTokenizer(
        _deepseek(_DEEPSEEK_SYMBOLS_LLAMACPP, _DEEPSEEK_CJK_LLAMACPP, r"\p{N}+"),
        trained_splits=_deepseek(_DEEPSEEK_SYMBOLS, _DEEPSEEK_CJK, _DIGIT),
        near=_OTHER_SPACES,
    ),
    "deepseek-coder": PreTokenizer(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK_LLAMACPP, _DIGIT),
        trained_splits=("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT),
        near=_OTHER_SPACES,
    ),
    "qwen35": PreTokenizer(
        (
            _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,
        )
    ),
    "dbrx": _LLAMA3_MERGED_ROW,
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "seed-coder": PreTokenizer(
        (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,)
    ),
    "bailingmoe": _BAILING_ROW,
    "ufakzeka": PreTokenizer((_words(_DIGIT, contraction=""),)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    "jais-2": PreTokenizer(
        (
            _LLAMA3.removesuffix(r"\s+(?!\S)|\s+").removesuffix("|")
            + _SPACES_BY_HALVES
            + r"|\s{1,2}(?!\S)|\s",
        )
    ),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK,
            _ASCII_PUNCTUATION
            + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]"
            + r"|\s+(?!\S)|\s+",
            _DIGIT,
        )
    ),
    "youtu": PreTokenizer(
        (
            _YOUTU_SCRIPTS,
            _cased(_ANY_CASE, _ANY_CASE, _DIGIT, _CONTRACTION + "?"),
        ),
        ignore_merges=True,
        trained_splits=(_YOUTU_SCRIPTS, _cased(_UPPER, _LOWER, _DIGIT, _CONTRACTION + "?")),
        near=_CAPITALS,
    ),
    "exaone-moe": PreTokenizer(
        (
            _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "granite-embed-multi-97m": PreTokenizer(
        (
            _cased(
                r"(?:(?=[\p{L}\p{M}])[^a-z])",
                r"(?:(?=[\p{L}\p{M}])[^A-Z])",
                r"\p{N}{1,3}",
                _CONTRACTION + "?",
            ),
        ),
        ignore_merges=True,
    ),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _words(_DIGIT))),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            _DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        )
    ),
    "bloom": _BLOOM_ROW,
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    # Other names for the rows above.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama3": _LLAMA3_ROW,
    "llama-v3": _LLAMA3_ROW,
    "falcon3": _LLAMA3_ROW,
    "falcon-h1": _LLAMA3_ROW,
    "pixtral": _LLAMA3_ROW,
    "midm-2.0": _LLAMA3_ROW,
    "lfm2": _LLAMA3_ROW,
    "jina-v5-nano": _LLAMA3_ROW,
    "glm4": _LLAMA3_ROW,
    "glm5": _LLAMA3_ROW,
    "chatglm-bpe": _LLAMA3_MERGED_ROW,
    "smaug-bpe": _LLAMA3_MERGED_ROW,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "mellum2": _DIGITS_GPT2,
    "mpt": _GPT2_ROW,
    "olmo": _GPT2_ROW,
    "jais": _GPT2_ROW,
    "phi-2": _GPT2_ROW,
    "gigachat": _GPT2_ROW,
    "a.x-4.0": _GPT2_ROW,
    "mellum": _GPT2_ROW,
    "exaone4": _GPT2_ROW,
    "trillion": _GPT2_ROW,
    "granite-docling": _GPT2_ROW,
    "modern-bert": _GPT2_ROW,
    "jina-es": _GPT2_ROW,
    "jina-de": _GPT2_ROW,
    "jina-v2-es": _GPT2_ROW,
    "jina-v2-de": _GPT2_ROW,
    "jina-v1-en": _GPT2_ROW,
    "jina-v2-code": _GPT2_ROW,
    "roberta-bpe": _GPT2_ROW,
    "deepseek-r1-qwen": _QWEN2_ROW,
    "kormo": _QWEN2_ROW,
    "f2llmv2": _QWEN2_ROW,
    "stablelm2": _QWEN2_ROW,
    "megrez": _QWEN2_ROW,
    "hunyuan": _QWEN2_ROW,
    "solar-open": _QWEN2_ROW,
    "grok-2": _QWEN2_ROW,
    "hunyuan-dense": _DEEPSEEK3_ROW,
    "joyai-llm": _DEEPSEEK3_ROW,
    "hy_v4": _DEEPSEEK3_ROW,
    "llama4": _GPT4O_ROW,
    "kanana2": _GPT4O_ROW,
    "minimax-m2": _GPT4O_ROW,
    "talkie": _GPT4O_ROW,
    "poro-chat": _BLOOM_ROW,
    "gpt3-finnish": _BLOOM_ROW,
    "bailingmoe2": _BAILING_ROW,
    "llada-moe": _BAILING_ROW,
}


def build(splits: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """``splits`` in turn, then bytes as letters, in the parts that tokenizer.json files use.

    GPT-2's expression and single digits have parts of their own, which every reader of a
    tokenizer.json knows; the rest are isolated ``Split``s.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits[-1] == _GPT2)
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == _DIGIT
        else pre_tokenizers.Split(Regex(split), "isolated")
        for split in (splits[:-1] if splits[-1] == _GPT2 else splits)
    ]
    return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
