"""Windows of token ids: what a tokenizer and a template make of texts, drawn by a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgellm.calibration import texts
from edgellm.calibration.documents import read_documents
from edgellm.calibration.texts import (
    CalibrationText,
    calibration_windows,
    check_readable,
    evaluation_windows,
)
from edgellm.errors import RuntimeMissing, UsageError
from edgellm.tokenization import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
)
BOS = 257


@pytest.fixture
def plain(write_model: Callable[..., Path], tensors: dict[str, object]) -> Tokenizer:
    """A token a byte, nothing around a text and no template."""
    return Tokenizer.from_hf_folder(write_model(tensors))


@pytest.fixture
def chatty(write_model: Callable[..., Path], tensors: dict[str, object]) -> Tokenizer:
    """A token a byte, a begin token before a text, and a template that writes it."""
    folder = write_model(tensors)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["added_tokens"].append({**rules["added_tokens"][0], "id": BOS, "content": "<s>"})
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer.from_hf_folder(folder)
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    tokenizer.settings = replace(tokenizer.settings, prefix_ids=(BOS,))
    return tokenizer


def by_hand(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """The ids of the library itself."""
    tokenizer.backend.encode_special_tokens = not special
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def drawn(tokenizer: Tokenizer, file: Path, length: int = 16, **options: int) -> CalibrationText:
    return calibration_windows(
        tokenizer, str(file), **{"tokens": 10**6, "window_tokens": length, **options}
    )


def test_a_text_is_cut_whole_and_drawn_by_digest(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    content = "".join(f"line {n} of café\n" for n in range(20))
    file.write_bytes(content.encode())
    ids = by_hand(plain, content)
    cut = [tuple(ids[at : at + 16]) for at in range(0, len(ids) - 15, 16)]
    order = sorted(range(len(cut)), key=lambda n: hashlib.sha256(f"7::{n}".encode()).digest())
    found = drawn(plain, file, seed=7)
    assert found.windows == tuple(cut[n] for n in order)
    assert found.name == "text.txt"
    assert found.tokens == 16 * len(cut)
    assert found.text_sha256 == hashlib.sha256(content.encode()).hexdigest()
    flat = b"".join(np.array([16, *w], "<i4").tobytes() for w in found.windows)
    assert found.sha256 == hashlib.sha256(flat).hexdigest()
    assert f"fills {found.tokens} tokens" in found.notes[0]


def test_a_seed_repeats_its_draw(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{n}," for n in range(500)))
    first, again, other = (drawn(plain, file, tokens=80, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first.windows) == 5
    assert first.sha256 != other.sha256
    # More tokens are the same windows and more.
    assert drawn(plain, file, tokens=160).windows[:5] == first.windows
    assert drawn(plain, file, tokens=81).tokens == 96


def test_windows_begin_as_the_tokenizer_says(chatty: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefghi" * 10)
    found = drawn(chatty, file, length=10)
    assert {window[0] for window in found.windows} == {BOS}
    assert {bytes_of(chatty, window) for window in found.windows} == {"abcdefghi"}
    assert len(found.windows) == 10


def bytes_of(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids))


def test_special_tokens_in_a_text_are_plain_characters(plain: Tokenizer, tmp_path: Path) -> None:
    (file := tmp_path / "text.txt").write_text("a<|end|>b" * 20)
    special = plain.backend.token_to_id("<|end|>")
    assert all(special not in window for window in drawn(plain, file).windows)


CHATS = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes <|end|>"}],
    [{"role": "user", "content": "Twice"}, {"role": "assistant", "content": "x" * 70}],
]


def test_chats_go_through_the_template(chatty: Tokenizer, tmp_path: Path) -> None:
    """The begin token is the template's, and the day that it is told is always the same."""
    file = tmp_path / "chats.jsonl"
    lines = [json.dumps({"messages": chat}) for chat in CHATS * 4]
    lines += [json.dumps({"prompt": CHATS[0][:1], "completion": CHATS[0][1:]}), ""]
    file.write_text("\n".join(lines))
    rendered = [
        "<s>" + "".join(f"<{m['role']}>{m['content']}\n" for m in chat) + "2025" for chat in CHATS
    ]
    small, large = (by_hand(chatty, text, special=True) for text in rendered)
    assert small.count(BOS) == 1
    assert chatty.backend.token_to_id("<|end|>") in small
    # Whole windows begin where a chat does; what is left of the long one goes on as a text does.
    wanted = {(*small, *large[: 64 - len(small)])}
    found = drawn(chatty, file, length=64)
    assert wanted <= set(found.windows)
    assert all(window[0] == BOS for window in found.windows)
    assert all(len(window) == 64 for window in found.windows)
    # One after the other, apart.
    measured = evaluation_windows(chatty, str(file), tokens=10**6, window_tokens=64)
    assert measured.windows[:2] == (tuple(small), tuple(large[:64]))
    assert measured.windows[2] == (BOS, *large[64:])


def test_prompts_and_texts_of_json_lines(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.JSONL"
    file.write_text(
        '{"text": "one\\ntwo", "id": 1}\n{"prompt": "The sky is", "completion": " blue."}'
    )
    found = evaluation_windows(plain, str(file), tokens=999, window_tokens=99)
    assert [bytes_of(plain, window) for window in found.windows] == ["one\ntwo", "The sky is blue."]


def test_a_long_document_after_a_short_one_is_not_lost(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    documents = ["s" * 10, "abcdefghij" * 5, "t" * 16, "u" * 16]
    file.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    found = {bytes_of(plain, window) for window in drawn(plain, file, length=16).windows}
    long = documents[1]
    assert found == {"s" * 10 + long[:6], long[6:22], long[22:38], long[38:] + "tttt", "u" * 16}


def test_parts_of_the_built_in_set_take_turns(
    plain: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "DATA", tmp_path)
    monkeypatch.setattr(texts, "PARTS", (("a",), ("b", "c")))
    for name, length in (("a", 3), ("b", 2), ("c", 4)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 16 * length}))
    found = calibration_windows(plain, tokens=999, window_tokens=16)
    letters = "".join(bytes_of(plain, window)[0] for window in found.windows)
    assert letters in ("abacabccc", "acabacbcc")
    assert [letters.count(name) for name in "abc"] == [3, 2, 4]


def test_the_built_in_set_is_enough_and_the_same_everywhere(plain: Tokenizer) -> None:
    """The windows of a byte tokenizer, by digest: changing the data changes models."""
    found = calibration_windows(plain, "BuiltIn")
    assert found == calibration_windows(plain)
    assert (found.name, len(found.windows), found.tokens) == ("builtin", 64, 32768)
    assert found.notes == ()
    assert {len(window) for window in found.windows} == {512}
    assert len(set(found.windows)) == 64


def test_the_built_in_texts_are_small_and_have_nothing_in_common() -> None:
    files = {path: path.read_text("utf-8") for path in texts.DATA.rglob("*.jsonl")}
    assert sum(len(text.encode()) for text in files.values()) <= 1_000_000
    named = {f"{name}.jsonl" for row in texts.PARTS for name in row}
    assert {path.relative_to(texts.DATA).as_posix() for path in files} - named == {
        f"{texts.EVALUATION}.jsonl"
    }
    seen: set[str] = set()
    measured: set[str] = set()
    for path in files:
        pieces = seen if path.stem != texts.EVALUATION else measured
        for document in read_documents(path):
            contents = [str(message["content"]) for message in document.messages]
            for text in contents or [document.text]:
                words = text.split() if " " in text else list(text)
                pieces |= {" ".join(words[at : at + 20]) for at in range(len(words) - 19)}
    assert len(measured) > 5000
    assert not seen & measured


def test_nothing_of_what_the_benchmarks_measure_on_is_built_in() -> None:
    from pydoc_data.topics import topics

    held_out = {line.strip() for text in topics.values() for line in text.splitlines()}
    ours = {
        line.strip()
        for path in texts.DATA.rglob("*.jsonl")
        for document in read_documents(path)
        for text in [document.text, *(str(m["content"]) for m in document.messages)]
        for line in text.splitlines()
    }
    assert not {line for line in ours & held_out if len(line) > 40}


def test_languages_beside_english() -> None:
    languages = [name.removeprefix("languages/") for row in texts.PARTS for name in row
                 if name.startswith("languages/")]  # fmt: skip
    assert len(languages) >= 6
    assert {"zh", "ja", "ko", "ru", "ar"} <= set(languages)


def test_a_model_without_a_template_is_given_built_in_chats_in_plain_words(
    plain: Tokenizer,
) -> None:
    first = evaluation_windows(plain, window_tokens=4096).windows[0]
    assert bytes_of(plain, first).startswith("Question: What is the capital of France")
    assert "\nAnswer: The capital" in bytes_of(plain, first)


def test_no_more_is_measured_on_than_asked(plain: Tokenizer) -> None:
    found = evaluation_windows(plain, tokens=600, window_tokens=100, context=90)
    assert found.tokens == sum(map(len, found.windows)) == 600
    assert max(map(len, found.windows)) == 90
    # A single token has nothing after it to measure.
    assert evaluation_windows(plain, tokens=91, window_tokens=90).tokens == 90


def test_too_short_too_few_and_a_tiny_context(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * 63)
    with pytest.raises(UsageError, match=r"text\.txt is too short: it has 63 tokens and 999 are"):
        drawn(plain, file, tokens=999)
    file.write_text("x" * 64)
    assert (
        "fills 64 tokens, in windows of 16, and 999 were" in drawn(plain, file, tokens=999).notes[0]
    )
    with pytest.raises(UsageError, match=r"48 tokens of calibration are too few: .* at least 64"):
        drawn(plain, file, tokens=48)
    with pytest.raises(UsageError, match=r"windows of 1 tokens .* the context is 1"):
        drawn(plain, file, context=1)
    short = drawn(plain, file, tokens=32, context=8)
    assert (len(short.windows), len(short.windows[0])) == (4, 8)
    assert "are 8 tokens long, as the model's context is, and not 16" in short.notes[0]
    file.write_text("")
    with pytest.raises(UsageError, match="it has 0 tokens"):
        drawn(plain, file)
    with pytest.raises(UsageError, match="has no tokens"):
        evaluation_windows(plain, str(file))


def test_chats_without_a_template(plain: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"messages": CHATS[0]}))
    with pytest.raises(UsageError, match=r"chats\.jsonl, line 2: .* no chat template"):
        drawn(plain, file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "cannot read"),
        ("none.jsonl", None, "cannot read"),
        ("none.parquet", None, "cannot read"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8"),
        ("wide.txt", "text".encode("utf-16-le"), "NUL characters"),
        ("wide.jsonl", b"\xff\xfe{}", r"wide\.jsonl, line 1 is not UTF-8"),
        ("list.json", b"[]", r"one object a line, into a file named \.jsonl"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b}', "line 3: not JSON .* at character 10"),
        ("x.jsonl", b"[1]", "line 1: expected an object with messages, text.* got a list"),
        ("x.jsonl", b'{"question": 1}', "got question"),
        ("x.jsonl", b'{"prompt": "only"}', "got prompt"),
        ("x.jsonl", b'{"text": 5}', "text must be a string, got 5"),
        ("x.jsonl", b'{"messages": []}', "got a list that is empty"),
        ("x.jsonl", b'{"messages": [{"content": "a"}]}', "each of the messages must be"),
        ("x.jsonl", b'{"messages": "a"}', "must be a list of objects .* got a string"),
    ],
)
def test_files_that_are_no_text(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says):
        check_readable(str(tmp_path / name))


def test_a_refusing_template_names_the_line(chatty: Tokenizer, tmp_path: Path) -> None:
    chatty.settings = replace(
        chatty.settings, chat_templates={"default": "{{ raise_exception('no system') }}"}
    )
    (file := tmp_path / "x.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    with pytest.raises(UsageError, match=r"x\.jsonl, line 1: .*no system"):
        drawn(chatty, file)


def test_a_template_that_refuses_does_not_stop_the_built_in_text(chatty: Tokenizer) -> None:
    """It is the default, so nothing that a user could mend may be in its way."""
    refusing, damaged = "{{ raise_exception('no chats') }}", "{% if %}"
    for template, why in ((refusing, "no chats"), (damaged, "not valid Jinja")):
        chatty.settings = replace(chatty.settings, chat_templates={"default": template})
        found = calibration_windows(chatty, tokens=4096)
        (note,) = found.notes
        assert "in plain words" in note
        assert why in note
        spoken = [w for w in found.windows if "\nAnswer: " in bytes_of(chatty, w)]
        assert spoken
        assert {window[0] for window in spoken} == {BOS}


def test_a_byte_order_mark_is_no_text(plain: Tokenizer, tmp_path: Path) -> None:
    (file := tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert [document.text for document in read_documents(file)] == ["abc"]


def test_large_files_are_read_in_part(
    plain: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 2000)
    (file := tmp_path / "text.txt").write_text("wörter und " * 1000, encoding="utf-8")
    found = drawn(plain, file, tokens=64)
    assert found.notes == ("of text.txt the first 2,000 bytes were read",)
    assert drawn(plain, file).notes[0].startswith("the calibration text text.txt fills")
    (read,) = read_documents(file, 100)
    assert read.text == "wörter und " * 8
    (cut,) = read_documents(file, 2)
    assert cut.text == "w"  # within the two bytes of a letter
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "abc"}\n' * 9)
    assert len(list(read_documents(lines, 40))) == 3


def test_parquet(plain: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "set.parquet"
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "messages": CHATS}), file)
    assert [list(document.messages) for document in read_documents(file)] == CHATS
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", None]}), file)
    rows = read_documents(file)
    assert next(rows).text == "one"
    with pytest.raises(UsageError, match=r"set\.parquet, row 2: expected an object"):
        next(rows)
    parquet.write_table(pyarrow.table({"id": [1]}), file)
    with pytest.raises(UsageError, match=r"expected columns messages, text.* got id"):
        check_readable(str(file))
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="cannot be read as a Parquet file"):
        check_readable(str(file))


def test_parquet_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (file := tmp_path / "set.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeMissing, match="pip install pyarrow"):
        check_readable(str(file))
