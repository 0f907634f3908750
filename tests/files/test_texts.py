"""The user's own texts: lines, characters and marks of files as they occur."""

import json
from pathlib import Path

import pytest

from bitladder.errors import BadInput
from bitladder.files.texts import read_texts


def texts(path):
    return [document.text for document in read_texts([path])]


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_hold_any_character(tmp_path, name, end):
    wanted = ["a\u2028b", "c\x85d\u2029", "e \U0001f600"]
    content = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in wanted) + end
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts(tmp_path / name) == wanted


def test_text_files_have_one_kind_of_line_end_and_no_mark(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xe2\x80\xa8four")
    assert texts(tmp_path / "t.txt") == ["one\ntwo\nthree\n\u2028four"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "smile \\ud83d here"}', "line 2: the text holds half of a surrogate pair"),
        ('{"text": 3}', "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON object"),
        ('{"text": "a', "line 2 is no JSON object"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        texts(tmp_path / "t.jsonl")


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "t.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(BadInput, match="no UTF-8 text"):
        texts(tmp_path / "t.txt")


def test_files_of_one_name_are_two_documents(tmp_path):
    paths = [tmp_path / place / "report.txt" for place in ("spring", "summer", "autumn")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"Of {path.parent.name}.")
    named = {document.name: document.text for document in read_texts(paths)}
    assert named == {"report": "Of spring.", "report (2)": "Of summer.", "report (3)": "Of autumn."}


def test_a_text_that_is_given_twice_is_one_document(tmp_path):
    """As two it would make intervals of what nothing is known about."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("The same words.")
    assert [one.name for one in read_texts([tmp_path / "a.txt", tmp_path / "a.txt", tmp_path])] == ["a"]


def test_what_never_ends_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.files.texts._LARGEST", 1000)
    with pytest.raises(BadInput, match="/dev/zero has more than 1000 B"):
        read_texts([Path("/dev/zero")])
    (tmp_path / "t.txt").write_text("t" * 1000)
    assert len(texts(tmp_path / "t.txt")[0]) == 1000
