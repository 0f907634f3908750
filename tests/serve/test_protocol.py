"""Requests: what is read, what is replaced, what is refused; the first event and the end of streams."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitladder.serve.events import BadEvent, first_event, has_error, read_events, stream_error, whole_events
from bitladder.serve.protocol import CHAT, COMPLETIONS, Refused, header_text, members, parse_request

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=6), st.sampled_from([None, 0, 2]), st.booleans())
def test_members_are_what_json_reads_and_where_it_reads_them(document, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    found = members(text)
    assert {name: member.value for name, member in found.items()} == document
    assert all(json.loads(text[member.start : member.end]) == member.value for member in found.values())


@given(st.dictionaries(st.text().map("x{}".format), VALUES, max_size=4), st.sampled_from([None, 1]))
def test_setting_values_changes_nothing_else(extra, indent):
    document = {**extra, "model": "auto", "messages": [{"role": "user", "content": "x"}], "stream": False}
    body = json.dumps(document, indent=indent).encode()
    new = parse_request(CHAT, body).with_values({"model": "other", "logprobs": True, "stream": True})
    assert json.loads(new) == {**document, "model": "other", "logprobs": True, "stream": True}
    assert list(json.loads(new)) == [*document, *(["logprobs"] if "logprobs" not in document else [])]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"[1]", "The body is not a JSON request: the body is not a JSON object."),
        (b'{"a":1,"a":2}', "The body is not a JSON request: the key 'a' comes twice."),
        (b'{"a":1}{}', "The body is not a JSON request: something follows the object at character 7."),
        (b'{"a":Infinity}', "The body is not a JSON request: Infinity is not JSON."),
        (b'{"a" 1}', "The body is not a JSON request: ':' was expected at character 5."),
        (b"\xff", "The body is not UTF-8: byte 0 is 0xff."),
        (b'{"a":' + b"[" * 100_000, "The body is nested too deeply."),
        (b'{"model":"auto"}', "'messages' is missing."),
        (b'{"model":"","messages":[{}]}', "'model' must be a name of 1 to 256 characters."),
    ],
)
def test_refusals_say_why(body, reason):
    with pytest.raises(Refused) as refused:
        parse_request(CHAT, body)
    assert (refused.value.status, refused.value.message) == (400, reason)


def test_what_is_asked_is_the_last_user_message():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None},
    ]
    request = parse_request(CHAT, json.dumps({"model": "auto", "messages": messages}).encode())
    assert request.asked == "second"
    assert request.text_bytes == len("be brief") + len("first") + len("second")
    assert parse_request(COMPLETIONS, b'{"model":"auto","prompt":["a","b"]}').asked == "a\nb"
    assert parse_request(COMPLETIONS, b'{"model":"auto","prompt":[1,2]}').asked == ""


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b"", None),
        (b'data: {"a":1}', None),
        (b'data: {"a":1}\n', None),
        (b'data: {"a":\ndata: 1}\n\n', {"a": 1}),
        (b'data:\n\ndata: \r\n\r\ndata\n\ndata: {"a":1}\n\n', {"a": 1}),
        ('data: {"a":"\u2028\x85"}\n\n'.encode(), {"a": "\u2028\x85"}),
        (b': ping\n\nevent: x\r\nid: 3\ndata:{"a":1}\r\n\r\n', {"a": 1}),
        (b"data: [DONE]\n\n", {}),
    ],
)
def test_first_event(data, event):
    assert first_event(data) == event


@pytest.mark.parametrize(
    "data",
    [b"hello\n", b"data: [1]\n\n", b"data: {\n\n", b"data: \xff\n\n", b"<html>\n", b'data: {"a": NaN}\n\n'],
)
def test_what_is_no_stream_of_events(data):
    with pytest.raises(ValueError):
        first_event(data)


def test_events_are_read_with_the_place_where_each_begins():
    data = b': ping\n\nid: 1\ndata: {"a": 1}\n\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\ndata: {"half'
    found = [(event.begins, event.ends, document) for event, document in read_events(data)]
    assert found == [(8, 30, {"a": 1}), (30, 47, {"b": 2}), (47, 61, None)]
    with pytest.raises(BadEvent) as bad:
        list(read_events(data[:47] + b"event: x\nnoise\n\n"))
    assert bad.value.begins == 47


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"error": {"message": "x"}}, True),
        ({"error": {}}, True),
        ({"error": {"code": 502}, "choices": [{}]}, True),
        ({"error": None, "choices": [{}]}, False),
        ({"error": "", "choices": [{}]}, False),
        ({"error": None, "data": []}, False),
        ({"error": False, "usage": {}}, False),
        ({"error": "out of memory"}, True),
        ({"choices": []}, False),
    ],
)
def test_what_counts_as_an_error(document, expected):
    assert has_error(document) is expected


@given(
    st.lists(
        st.sampled_from([b"data: {}\n\n", b"data: {}\r\n\r\n", b": x\n\n", b"event: a\n", b"data: {}\n\r\n"]),
        max_size=5,
    ),
    st.data(),
)
def test_whole_events_cut_only_at_empty_lines(events, data):
    stream = b"".join(events)
    cut = whole_events(stream[: data.draw(st.integers(0, len(stream)))])
    assert cut == 0 or stream[:cut].endswith((b"\n\n", b"\n\r\n"))


def test_header_text_is_one_line_of_ascii():
    assert header_text("a\r\nx-evil: 1\x00é" + "b" * 400) == "a??x-evil: 1??" + "b" * 286


def test_stream_error_is_an_event_with_an_error():
    event = first_event(stream_error("It broke off.", "upstream_failed"))
    assert event == {
        "error": {"message": "It broke off.", "type": "server_error", "param": None, "code": "upstream_failed"}
    }
