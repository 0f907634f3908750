"""Endpoints behind proxies and certificates of their own, for the client that measures and the one that serves."""

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from bitladder.engines.base import Chat
from bitladder.engines.endpoint import Endpoint, endpoint_at
from bitladder.engines.network import is_loopback, proxy_for, tls_context
from bitladder.errors import BitladderError, UsageError
from bitladder.serve import connections
from bitladder.serve.app import build_app
from bitladder.serve.deploy import deployed
from bitladder.serve.settings import ServeSettings, TierSpec
from upstreams import CHAT, chat

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (*VARIABLES, *CERTIFICATES, "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    connections.address_of.cache_clear()
    yield
    connections.address_of.cache_clear()


P = "http://proxy.test:3128"


@pytest.mark.parametrize(
    ("variables", "url", "place"),
    [
        ({}, "http://h/v1", None),
        ({"HTTP_PROXY": P}, "http://h/v1", "proxy.test:3128"),
        ({"http_proxy": P}, "http://h:8000/v1", "proxy.test:3128"),
        ({"HTTP_PROXY": P}, "https://h/v1", None),
        ({"HTTPS_PROXY": P}, "https://h/v1", "proxy.test:3128"),
        ({"ALL_PROXY": P}, "https://h/v1", "proxy.test:3128"),
        ({"HTTPS_PROXY": "proxy.test:8080"}, "https://h/v1", "proxy.test:8080"),
        ({"HTTPS_PROXY": "https://proxy.test"}, "https://h/v1", "proxy.test:443"),
        ({"ALL_PROXY": P, "NO_PROXY": "h"}, "https://h/v1", None),
        ({"ALL_PROXY": P, "NO_PROXY": ".lan, other"}, "https://models.lan:8000/v1", None),
        ({"ALL_PROXY": P, "NO_PROXY": "*"}, "https://h/v1", None),
        ({"ALL_PROXY": P, "NO_PROXY": "other"}, "https://h/v1", "proxy.test:3128"),
        ({"ALL_PROXY": P}, "http://127.0.0.1:8000/v1", None),
        ({"ALL_PROXY": P}, "http://127.8.9.10/v1", None),
        ({"ALL_PROXY": P}, "http://localhost/v1", None),
        ({"ALL_PROXY": P}, "https://[::1]:8443/v1", None),
        ({"ALL_PROXY": P}, "http://api.localhost/v1", None),
        ({"ALL_PROXY": P}, "http://localhost.example/v1", "proxy.test:3128"),
        ({"ALL_PROXY": P}, "http://10.0.0.5/v1", "proxy.test:3128"),
    ],
)
def test_the_proxy_of_an_address(monkeypatch, variables, url, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(url)
    assert (found and found.place) == place


def test_the_key_of_a_proxy_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:hunter%202@proxy.test")
    proxy = proxy_for("http://h/v1")
    assert proxy.authorization == "Basic dXNlcjpodW50ZXIgMg==" and "hunter" not in repr(proxy)


@pytest.mark.parametrize("wrong", ["socks5://h:1080", "http://", "http://h:port", "ftp://x"])
def test_what_is_no_http_proxy_is_named(monkeypatch, wrong):
    monkeypatch.setenv("ALL_PROXY", wrong)
    with pytest.raises(UsageError, match="no HTTP proxy"):
        proxy_for("http://h/v1")


def test_what_cannot_be_used_is_refused_when_serving_begins(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1080")
    with pytest.raises(UsageError, match="no HTTP proxy"):
        served("http://model.test/v1")
    with pytest.raises(UsageError, match="no HTTP proxy"):
        measured("http://model.test/v1")


def test_certificates_that_cannot_be_used_are_named(monkeypatch, tmp_path):
    (tmp_path / "none.pem").write_text("no certificate")
    for path in (tmp_path / "none.pem", tmp_path / "missing.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with pytest.raises(UsageError, match="SSL_CERT_FILE"):
            tls_context()


def test_this_machine():
    assert all(map(is_loopback, ("localhost", "LOCALHOST.", "127.0.0.1", "[::1]", "a.localhost")))
    assert not any(map(is_loopback, ("", "h", "10.0.0.1", "127.0.0.1.example", "::2")))


class Answering(BaseHTTPRequestHandler):
    """An endpoint with one model, and a proxy in plain HTTP: both are asked for a path or a whole address."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "m"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        self.reply({"model": "m", "choices": [choice], "usage": {}})

    def reply(self, document):
        self.server.seen.append((self.path, self.headers.get("proxy-authorization")))
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_CONNECT(self):
        """A tunnel to the server that stands for every host."""
        self.server.seen.append((f"CONNECT {self.path}", self.headers.get("proxy-authorization")))
        if self.server.behind is None:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", self.server.behind)) as there:
            threading.Thread(target=pump, args=(there, self.connection), daemon=True).start()
            pump(self.connection, there)
        self.close_connection = True


def pump(here: socket.socket, there: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := here.recv(65536):
            there.sendall(data)
    with contextlib.suppress(OSError):
        there.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def listening(behind: int | None = None, certificate: Path | None = None) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.seen, server.behind = [], behind
    server.handle_error = lambda *_: None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def measured(url: str) -> str:
    with Endpoint(endpoint_at(f"{url}#m")) as endpoint:
        endpoint.probe()
        return endpoint.chat(Chat.of("x", 4)).text


def served(url: str) -> str:
    async def run() -> httpx.Response:
        async with deployed(ServeSettings(TierSpec("m", url=url, model="m", n_ctx=0))) as deployment:
            transport = httpx.ASGITransport(build_app(deployment))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                first, second = [await client.post(CHAT, json=chat("auto")) for _ in range(2)]
                assert first.content == second.content
                return second

    reply = asyncio.run(run())
    return reply.json()["choices"][0]["message"]["content"] if reply.status_code == 200 else reply.text


@pytest.mark.parametrize("ask", [measured, served])
def test_a_proxy_in_plain_http_is_asked_for_the_whole_address(monkeypatch, ask):
    with listening() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:pw@127.0.0.1:{proxy.server_port}")
        assert ask("http://model.test:8000/v1") == "hi"
        assert {path for path, _ in proxy.seen} == {
            "http://model.test:8000/v1/models", "http://model.test:8000/v1/chat/completions",
        }  # fmt: skip
        assert {key for _, key in proxy.seen} == {"Basic dXNlcjpwdw=="}


@pytest.mark.parametrize("ask", [measured, served])
def test_this_machine_is_asked_without_the_proxy(monkeypatch, ask):
    with listening() as endpoint:
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        assert ask(f"http://127.0.0.1:{endpoint.server_port}/v1") == "hi"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate and its key for model.test, which nobody trusts unless told to."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "model.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", f"{path}.crt", "-days", "2",
         "-subj", "/CN=model.test", "-addext", "subjectAltName=DNS:model.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("ask", [measured, served])
def test_a_tunnel_to_an_endpoint_with_a_certificate_of_its_own(monkeypatch, certificate, ask, variable):
    with listening(certificate=certificate) as endpoint, listening(behind=endpoint.server_port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:pw@127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv(variable, f"{certificate}.crt")
        assert ask("https://model.test:8443/v1") == "hi"
        assert set(proxy.seen) == {("CONNECT model.test:8443", "Basic dXNlcjpwdw==")}
        assert [path for path, _ in endpoint.seen][:2] == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize("ask", [measured, served])
def test_a_certificate_that_nobody_vouches_for_is_refused(monkeypatch, certificate, ask):
    with listening(certificate=certificate) as endpoint, listening(behind=endpoint.server_port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setattr("time.sleep", lambda _: None)
        if ask is measured:
            with pytest.raises(BitladderError, match="certificate"):
                ask("https://model.test:8443/v1")
        else:
            assert "upstream_failed" in ask("https://model.test:8443/v1")
        assert endpoint.seen == []


def test_a_proxy_that_refuses_is_named(monkeypatch):
    with listening() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")

        async def run() -> None:
            async with connections.ConnectionPool(5.0) as pool:
                await pool.get("https://model.test/v1", "/models", 5.0)

        with pytest.raises(BitladderError, match=r"the proxy at 127\.0\.0\.1:\d+ answered with status 403"):
            asyncio.run(run())
