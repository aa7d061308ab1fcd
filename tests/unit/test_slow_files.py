"""Folders without a tokenizer.json: what their older files must hold, and what is refused."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import slow_folder

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization import Tokenizer
from edgellm.tokenization.pieces import backend_of
from edgellm.tokenization.pieces_file import parse

LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "ab", "bos_token": "ab"}


def varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, 64 bits for negative ones."""
    value %= 1 << 64
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def message(*fields: tuple[int, int | bytes | float]) -> bytes:
    """A protobuf message: numbers as varints, floats as four bytes, the rest by their length."""
    data = b""
    for number, value in fields:
        if isinstance(value, float):
            data += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            data += varint(number << 3) + varint(value)
        else:
            data += varint(number << 3 | 2) + varint(len(value)) + value
    return data


def model_file(
    *trainer: tuple[int, int], normalizer: tuple[tuple[int, int | bytes], ...] = ()
) -> bytes:
    """A small SentencePiece model: special pieces, bytes, and one merge."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("ab", -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1), ("▁", -4.0, 1)]
    fields: list[tuple[int, bytes]] = [
        (1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in pieces
    ]
    settings = {3: 2, 35: 1, **dict(trainer)}
    # An unknown field of eight bytes, and one of another message: both are passed over.
    fields += [(2, message(*settings.items()) + varint(99 << 3 | 1) + bytes(8)), (7, b"later")]
    return message(*fields, (3, message(*normalizer)))


def test_a_piece_file_by_its_definition() -> None:
    found = parse(model_file((43, -1)), "x")
    assert found.special_ids == {"unk": 0, "bos": 1, "eos": 2}
    pieces = found.pieces
    assert (pieces.unigram, pieces.byte_fallback) == (False, True)
    # Defaults of the format: a space before, spaces squeezed.
    assert (pieces.space_prefix, pieces.squeezes_spaces, pieces.charsmap) == (True, True, b"")
    assert backend_of(pieces).encode("  ab  ").tokens == ["▁", "ab"]
    plain = parse(model_file(normalizer=((3, 0), (4, 0))), "x").pieces
    assert backend_of(plain).encode(" abc").tokens == ["▁", "ab", "<0x63>"]
    assert backend_of(plain).decode([262, 259, 3 + 0x63]) == " abc"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no pieces"),
        (b"\xff" * 12, "more than ten bytes"),
        (model_file()[:-3], "within a field|within a number"),
        (model_file()[:700], "within a field"),
        (b"\x0b\x0b", "unknown kind 3"),
        (b"not a model at all", "is no SentencePiece model"),
        (message((1, message((1, b"\xff"))), (2, message((3, 2)))), "is no SentencePiece model"),
        (message((1, message((1, 5))), (2, message((3, 2)))), "a number where a text"),
        (message((1, b""), (1, b""), (2, message((3, 2)))), "twice"),
        (model_file(normalizer=((2, b"\xff\xff\xff\xffxx"),)), "replaced characters"),
        (model_file((3, 1), (40, -1)), "names no piece for what it does not know"),
    ],
)
def test_damaged_piece_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    folder = slow_folder(tmp_path, tokenizer__model=data, tokenizer_config__json=LLAMA)
    with pytest.raises(SourceError, match=message):
        Tokenizer.from_hf_folder(folder)


def test_random_damage_is_an_error_of_ours_or_none() -> None:
    choose = random.Random(7)
    whole, refused = model_file(), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(choose.choice((1, 2, 5, 20))):
            data[choose.randrange(len(data))] = choose.randrange(256)
        try:
            backend_of(parse(bytes(data), "x").pieces).encode("ab c\n x")
        except (SourceError, UnsupportedTokenizer):
            refused += 1
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (model_file((3, 3)), "of type 'word'"),
        (model_file((3, 4)), "of type 'char'"),
        (model_file((24, 1)), "behind a word"),
        (model_file(normalizer=((5, 0),)), "leaves spaces"),
    ],
)
def test_piece_files_of_other_kinds_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    folder = slow_folder(tmp_path, tokenizer__model=data, tokenizer_config__json=LLAMA)
    with pytest.raises(UnsupportedTokenizer, match=message):
        Tokenizer.from_hf_folder(folder)


def test_the_config_says_what_is_put_around_a_text(tmp_path: Path) -> None:
    for flags, before, after in (
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"add_bos_token": None, "bos_token": "</s>"}, [2], []),
    ):
        folder = slow_folder(
            tmp_path, tokenizer__model=model_file(), tokenizer_config__json={**LLAMA, **flags}
        )
        tokenizer = Tokenizer.from_hf_folder(folder)
        assert tokenizer.encode("ab", add_special=True) == [*before, 262, 259, *after]
    folder = slow_folder(
        tmp_path,
        tokenizer__model=model_file(),
        tokenizer_config__json={**LLAMA, "bos_token": "<begin>"},
    )
    with pytest.raises(SourceError, match="'<begin>' for it, which is no token"):
        Tokenizer.from_hf_folder(folder)


def test_the_models_type_stands_in_for_the_class(tmp_path: Path) -> None:
    folder = slow_folder(
        tmp_path, tokenizer__model=model_file(), config__json={"model_type": "mistral"}
    )
    assert Tokenizer.from_hf_folder(folder).add_bos


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__model": model_file()},
        {"vocab__json": {"a": 0}, "merges__txt": b""},
        {"vocab__txt": b"[UNK]\n"},
        {"x__tiktoken": b"YQ== 0\n"},
        {"tokenizer__model": b"YQ== 0\n"},
    ],
)
@pytest.mark.parametrize("cls", ["NoSuchTokenizer", None])
def test_a_class_that_is_not_known_is_refused(
    tmp_path: Path, files: dict[str, Any], cls: str | None
) -> None:
    config = {"tokenizer_class": cls} if cls else {}
    folder = slow_folder(tmp_path, tokenizer_config__json=config, **files)
    named = cls or "no tokenizer_class"
    with pytest.raises(UnsupportedTokenizer, match=rf"names {named}.*save_pretrained"):
        Tokenizer.from_hf_folder(folder)


VOCAB = {"a": 0, "b": 1, "ab": 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab__json": VOCAB}, r"no merges\.txt"),
        ({"vocab__json": {"a": "b"}, "merges__txt": b""}, "ids by token"),
        ({"vocab__json": VOCAB, "merges__txt": b"#version: 0.2\na b\nabc\n"}, "line 3 is 'abc'"),
        ({"vocab__json": VOCAB, "merges__txt": b"a c\n"}, "do not fit"),
        ({"vocab__json": VOCAB, "merges__txt": b"\xff\n"}, "is not UTF-8"),
        ({"vocab__json": b"{", "merges__txt": b""}, "is not JSON"),
        (
            {"vocab__json": VOCAB, "merges__txt": b"a b\n", "added_tokens__json": {"<x>": 9}},
            "the id 9, where the next free one is 3",
        ),
        (
            {"vocab__json": VOCAB, "merges__txt": b"a b\n", "added_tokens__json": {"<x>": "y"}},
            "ids by token",
        ),
    ],
)
def test_damaged_vocabularies_are_named(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    folder = slow_folder(tmp_path, tokenizer_config__json=GPT2, **files)
    with pytest.raises(SourceError, match=message):
        Tokenizer.from_hf_folder(folder)


def test_gpt2_files_of_a_model_with_other_rules_are_refused(tmp_path: Path) -> None:
    folder = slow_folder(
        tmp_path,
        vocab__json=VOCAB,
        merges__txt=b"a b\n",
        tokenizer_config__json=GPT2,
        config__json={"model_type": "starcoder2"},
    )
    with pytest.raises(UnsupportedTokenizer, match=r"'starcoder2'.*fetch its tokenizer\.json"):
        Tokenizer.from_hf_folder(folder)


def ranks_file(*, without: int = -1) -> bytes:
    lines = [
        base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256) if byte != without
    ]
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ranks_file() + b"\n!!! 256", "line 257 is"),
        (ranks_file() + b"\nYQ== x", "line 257 is"),
        (ranks_file() + b"\nYQ== 256", "each once"),
        (ranks_file() + b"\nYWI= 300", "from 0 on"),
        (ranks_file(without=255), r"1 are missing"),
    ],
)
def test_damaged_ranks_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    config = {"tokenizer_class": "QWenTokenizer"}
    folder = slow_folder(tmp_path, qwen__tiktoken=data, tokenizer_config__json=config)
    with pytest.raises(SourceError, match=message):
        Tokenizer.from_hf_folder(folder)


def test_ranks_without_special_tokens_are_refused(tmp_path: Path) -> None:
    folder = slow_folder(
        tmp_path, tokenizer__model=ranks_file(), config__json={"model_type": "llama"}
    )
    with pytest.raises(UnsupportedTokenizer, match="holds no special tokens"):
        Tokenizer.from_hf_folder(folder)


def tekken(**changes: Any) -> dict[str, Any]:
    vocab = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()}
        for byte in range(256)
    ]
    config = {"pattern": r"\w+|\W", "default_vocab_size": 259, "default_num_special_tokens": 3}
    return {"config": {**config, **changes}, "vocab": vocab}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no tekken vocabulary"),
        ({}, "KeyError: 'config'"),
        ([], "no tekken vocabulary"),
        (tekken(default_vocab_size="many"), "no tekken vocabulary"),
        (tekken(default_vocab_size=200), "59 are missing"),
        (tekken(pattern="("), "no regular expression"),
        (tekken() | {"vocab": [{"rank": 0, "token_bytes": "!"}]}, "no tekken vocabulary"),
    ],
)
def test_damaged_tekken_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(SourceError, match=message):
        Tokenizer.from_hf_folder(slow_folder(tmp_path, tekken__json=data))


def test_a_word_list_needs_its_unknown_word(tmp_path: Path) -> None:
    config = {"tokenizer_class": "BertTokenizer"}
    folder = slow_folder(tmp_path, vocab__txt=b"a\nb\n", tokenizer_config__json=config)
    with pytest.raises(SourceError, match=r"unknown token '\[UNK\]'"):
        Tokenizer.from_hf_folder(folder)


def test_what_is_written_is_a_whole_folder(tmp_path: Path) -> None:
    config = {**LLAMA, "chat_template": "{{ bos_token }}"}
    folder = slow_folder(tmp_path, tokenizer__model=model_file(), tokenizer_config__json=config)
    tokenizer = Tokenizer.from_hf_folder(folder)
    files = {name.replace(".", "__"): data for name, data in tokenizer.files().items()}
    assert set(tokenizer.files()) == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    again = Tokenizer.from_hf_folder(slow_folder(tmp_path / "again", **files))
    assert again.encode("ab</s>", add_special=True) == tokenizer.encode("ab</s>", add_special=True)
    assert again.render_chat([]) == tokenizer.render_chat([]) == "<s>"
    assert again.sha256() == tokenizer.sha256()
