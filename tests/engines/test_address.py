"""One rule for addresses of endpoints, whoever asks: serve, compare, run --also. And where their keys come from."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.cli.options import endpoint_named
from bitladder.engines.address import api_base, split_address
from bitladder.engines.base import Chat
from bitladder.engines.endpoint import Endpoint, EndpointSettings, connected, endpoint_at
from bitladder.errors import UsageError
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from upstreams import CHAT, chat

KEY = "sk-a-very-secret-key"


@contextlib.contextmanager
def api_at(base: str, *models: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A strict endpoint: it answers under this base path alone, and wants its model named. Gives its root URL, and each
    path with the authorization it came with.
    """
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, document):
            seen.append((self.path, self.headers.get("authorization")))
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            known = self.path == f"{base}/models"
            self.reply(*((200, {"data": [{"id": name} for name in models]}) if known else (404, {"error": "no path"})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != f"{base}/chat/completions":
                self.reply(404, {"error": "no path"})
            elif body.get("model") not in models:
                self.reply(400, {"error": "model is required"})
            else:
                choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
                self.reply(200, {"model": body["model"], "choices": [choice], "usage": {}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h", "http://h/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("https://g/v1beta/openai", "https://g/v1beta/openai"),
        ("https://g/v1beta/openai/", "https://g/v1beta/openai"),
        ("https://z/api/paas/v4", "https://z/api/paas/v4"),
        ("https://q/compatible-mode/v1", "https://q/compatible-mode/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/v1/models/", "http://h/v1"),
        ("http://h/chat/completions", "http://h/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        (" http://h/v1 ", "http://h/v1"),
    ],
)
def test_the_base_of_an_address(given, base):
    assert api_base(given) == api_base(base) == base
    assert EndpointSettings(given).base_url == TierSpec("x", url=given).url == base
    assert split_address(f"{given.strip()}#org/a%20b") == (base, "org/a b")


@pytest.mark.parametrize(
    "wrong", ["", "h:8000", "ftp://h", "http://", "http://h:port", "http://[::1", "http://h\nx", "http://a b", "//h/v1"]
)
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(UsageError, match="no address"):
        api_base(wrong)


@pytest.mark.parametrize("secret", ["http://user:hunter2@h/v1", "http://hunter2@h", "http://h/v1?key=hunter2"])
def test_addresses_hold_no_keys_and_errors_do_not_repeat_them(secret):
    for address in (secret, secret.replace("http", "ftp"), secret.replace("h/", "h:port/")):
        with pytest.raises(UsageError) as caught:
            api_base(address)
        assert "hunter2" not in str(caught.value)


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://h/", "http://h:1/v1?"]))
def test_any_text_is_an_address_or_refused(text, start):
    with contextlib.suppress(UsageError):
        base = api_base(start + text)
        assert api_base(base) == base and not base.endswith("/")


@pytest.mark.parametrize("base", ["/v1", "/v1beta/openai", "/api/paas/v4", "/openai/v1"])
@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_every_verb_asks_the_same_paths(base, end):
    async def through_gateway(url: str) -> httpx.Response:
        async with deployed(ServeSettings(TierSpec("m", url=url, model="m", api_key=KEY, n_ctx=0))) as deployment:
            assert not deployment.notes  # its models were listed
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(CHAT, json=chat("auto"), headers={"authorization": "Bearer the-clients"})

    with api_at(base, "m") as (url, seen):
        reply = asyncio.run(through_gateway(f"{url}{base}{end}"))
        assert reply.status_code == 200, reply.text
        with Endpoint(endpoint_at(f"{url}{base}{end}#m")) as endpoint:
            endpoint.probe()
            assert endpoint.chat(Chat.of("x", 4)).text == "hi"
        paths = [f"{base}/models", f"{base}/chat/completions"]
        assert [path for path, _ in seen] == paths * 2
        assert {key for _, key in seen} == {f"Bearer {KEY}", None}


def test_two_endpoints_are_compared_by_their_models():
    with api_at("/api/v4", "a", "b") as (url, _):
        done = CliRunner().invoke(app, ["compare", f"{url}/api/v4#a", f"{url}/api/v4#b", "Hello", "--json"])
        assert done.exit_code == 0, done.output
        assert [json.loads(done.stdout)[side]["level"] for side in "ab"] == ["a", "b"]
        unnamed = CliRunner().invoke(app, ["compare", f"{url}/api/v4", f"{url}/api/v4#b", "Hello"])
        assert unnamed.exit_code == 2
        assert "serves 2 models: a, b" in unnamed.stderr


def test_an_endpoint_with_one_model_need_not_be_told_which():
    with api_at("/v1", "only") as (url, _), connected(endpoint_at(url)) as endpoint:
        assert endpoint.chat(Chat.of("x", 4)).model == "only"


def test_keys_belong_to_hosts_and_a_file_goes_before_a_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.key").write_text(f"{KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MINE", "sk-mine")

    def key(address: str, variables: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> str:
        return endpoint_named(address, list(variables), key_files=list(files)).read_key()

    assert key("https://api.openai.com/v1#gpt") == "sk-openai"
    assert key("http://h:8000") == ""
    assert key("http://h:8000", ("MINE",)) == "sk-mine"
    assert key("http://h:8000", ("h=MINE",)) == key("http://h:8000", ("h:8000=MINE",)) == "sk-mine"
    assert key("http://other", ("h=MINE",), ("h=x.key",)) == ""
    assert key("https://api.openai.com/v1", ("MINE",), ("./a=b.key",)) == KEY
    assert key("http://h:8000", (), (f"h:8000={tmp_path}/a=b.key",)) == KEY
    assert KEY not in repr(endpoint_named("http://h", None, key_files=["./a=b.key"]))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "holds no key"),
        ("\n\n", "holds no key"),
        ("two\nlines", "more than a key"),
        ("x" * 5000, "more than a key"),
        ("sk-secret with spaces", "no key has"),
        ("sk-secret-ü", "no key has"),
        ("sk-secret\x00", "no key has"),
        (b"\xff\xfe", "no text"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_key_is_refused_and_not_repeated(content, found, tmp_path):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=found) as caught:
        endpoint_named("http://h", None, key_files=[str(path)]).read_key()
    assert "sk-secret" not in str(caught.value)


def test_a_cloud_is_not_served_without_its_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = CliRunner().invoke(app, ["serve", "--quality", "https://api.openai.com/v1#gpt"])
    assert done.exit_code == 2
    assert "OPENAI_API_KEY is empty" in done.stderr


def test_no_verb_takes_a_key_itself():
    """A key on a command line is seen by every user of the machine, and kept by the shell."""
    for verb in ("serve", "export", "compare", "run"):
        shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).stdout
        options = {word.strip(",") for line in shown.splitlines() for word in line.split() if word.startswith("--")}
        assert {option for option in options if "key" in option} <= {
            "--key-env", "--key-file", "--api-key-file", "--judge-key-env",
        }  # fmt: skip
        assert {"--key-env", "--key-file"} <= options


def test_the_shown_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert endpoint_named("http://h", None, key_files=["k"]).key_file == str(Path("k").absolute())
