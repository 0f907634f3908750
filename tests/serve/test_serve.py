"""The gateway as a process: real llama.cpp engines, the real OpenAI clients, manners on the wire."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.model

PROGRAM = """
import json, sys
from pathlib import Path
from bitladder.serve.app import serve
from bitladder.serve.settings import ServeSettings, TierSpec, UpstreamTimeouts
told = json.loads(sys.argv[1])
specs = {role: TierSpec(**{**spec, "path": spec.get("path") and Path(spec["path"])}) for role, spec in told.items()}
settings = ServeSettings(**specs, port=0, threads=1, drain_s=float(sys.argv[2]), timeouts=UpstreamTimeouts(restart=20))
serve(settings, lambda address, _: print(json.dumps(address), flush=True))
"""
PROMPT = [{"role": "user", "content": "Name three colours."}]


@dataclass
class Served:
    url: str
    process: subprocess.Popen

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def live(self) -> dict:
        return httpx.get(f"{self.url}/bitladder/api/live", trust_env=False).json()


@contextlib.contextmanager
def served(log: Path, drain_s: float = 10, **specs: dict) -> Iterator[Served]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(specs), str(drain_s)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield Served(json.loads(line), process)
        finally:
            process.terminate()
            process.wait(timeout=30)
            process.stdout.close()


@pytest.fixture(scope="module")
def gateway(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = {"path": str(demo_gguf), "n_ctx": 512}
    log = tmp_path_factory.mktemp("serve") / "log"
    tiers = {"quality": {"level": "Q4_1", "sha256": "a" * 64}, "speed": {"level": "Q4_1-twin", "sha256": "b" * 64}}
    with served(log, **{role: {**file, **spec} for role, spec in tiers.items()}) as running:
        yield running


def test_openai_client_document_and_stream_agree(gateway):
    asked = {"messages": PROMPT, "max_tokens": 12, "temperature": 0}
    raw = gateway.client.chat.completions.with_raw_response.create(model="quality", **asked)
    whole = raw.parse()
    assert raw.headers["x-bitladder-tier"] == "quality"
    assert raw.headers["x-bitladder-file-sha256"] == "a" * 64
    assert (whole.model, whole.usage.completion_tokens) == ("Q4_1", 12)
    stream = gateway.client.chat.completions.create(model="speed", stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content


def test_openai_client_completions_structured_output_and_probabilities(gateway):
    client = gateway.client
    assert client.completions.create(model="q4_1", prompt="One, two,", max_tokens=4).choices[0].text
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(
        model="auto", messages=PROMPT, max_tokens=30, temperature=0, response_format=shape, logprobs=True
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["n"], int)
    assert all(token.logprob <= 0 for token in reply.choices[0].logprobs.content)


def test_responses_and_messages_from_the_real_engine(gateway):
    asked = {"model": "quality", "input": "Name three colours.", "max_output_tokens": 12, "temperature": 0}
    whole = gateway.client.responses.create(**asked)
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 12)
    stream = gateway.client.responses.create(stream=True, **asked)
    assert "".join(one.delta for one in stream if one.type == "response.output_text.delta") == whole.output_text
    message = {"model": "quality", "messages": PROMPT, "max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{gateway.url}/v1/messages", json=message, timeout=120, trust_env=False)
    assert reply.json()["content"] == [{"type": "text", "text": whole.output_text}]
    assert (reply.json()["stop_reason"], reply.headers["x-bitladder-level"]) == ("max_tokens", "Q4_1")
    counted = httpx.post(f"{gateway.url}/v1/messages/count_tokens", json=message, timeout=120, trust_env=False)
    assert counted.json()["input_tokens"] == whole.usage.input_tokens


def test_openai_client_meets_clear_errors(gateway):
    client = gateway.client
    with pytest.raises(openai.NotFoundError, match="There is: auto, q4_1, q4_1-twin, quality, speed"):
        client.chat.completions.create(model="gpt-4", messages=PROMPT)
    with pytest.raises(openai.BadRequestError, match="exceeds the available context"):
        client.chat.completions.create(model="speed", messages=[{"role": "user", "content": "hello " * 600}])
    with pytest.raises(openai.BadRequestError, match="512 holds at most 32768"):
        client.chat.completions.create(model="speed", messages=[{"role": "user", "content": "hello " * 6000}])
    with pytest.raises(openai.InternalServerError, match="embeddings"):
        client.embeddings.create(model="quality", input="x")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="image"):
        client.chat.completions.create(model="auto", messages=[{"role": "user", "content": [picture]}])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(model="auto", messages=PROMPT, tools=[tool], tool_choice="required")
    assert client.models.retrieve("speed").id == "speed"
    assert [model.id for model in client.models.list()] == ["auto", "quality", "Q4_1", "speed", "Q4_1-twin"]


def test_openai_client_for_node(gateway, tmp_path):
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("Node and npm are not installed")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai"]
    try:
        installed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not fetch the openai package in time")
    if installed.returncode != 0:
        pytest.skip("npm cannot fetch the openai package here")
    script = tmp_path / "ask.cjs"
    script.write_text("""
        const OpenAI = require("openai").default;
        const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
        (async () => {
            const asked = { messages: [{ role: "user", content: "Name three colours." }], max_tokens: 8 };
            asked.temperature = 0;
            const whole = await client.chat.completions.create({ model: "speed", ...asked });
            let text = "";
            for await (const chunk of await client.chat.completions.create({ model: "speed", stream: true, ...asked }))
                text += chunk.choices[0].delta.content ?? "";
            console.log(JSON.stringify([whole.choices[0].message.content, text]));
        })();
    """)
    done = subprocess.run([node, str(script), gateway.url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    whole, streamed = json.loads(done.stdout)
    assert whole and whole == streamed


def test_engines_answer_the_gateway_alone(gateway):
    for engine in psutil.Process(gateway.process.pid).children():
        ports = {at.laddr.port for at in engine.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
        for port in ports:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            reply = httpx.post(url, json={"messages": PROMPT, "max_tokens": 1}, trust_env=False)
            assert reply.status_code == 401
        assert ports


def test_a_client_that_leaves_frees_the_engine(gateway):
    stream = gateway.client.chat.completions.create(model="speed", messages=PROMPT, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while (last := gateway.live()["recent"][0])["outcome"] != "client left" or last["tier"] != "speed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert gateway.client.chat.completions.create(model="speed", messages=PROMPT, max_tokens=1).choices


def test_a_killed_engine_is_covered_for_and_comes_back(gateway):
    engines = [
        child for child in psutil.Process(gateway.process.pid).children() if "Q4_1-twin" in "".join(child.cmdline())
    ]
    engines[0].kill()
    raw = gateway.client.chat.completions.with_raw_response.create(model="speed", messages=PROMPT, max_tokens=2)
    assert raw.parse().choices
    if raw.headers["x-bitladder-tier"] == "quality":  # it may have been restarted already
        assert "the speed tier" in raw.headers["x-bitladder-reason"]
    deadline = time.monotonic() + 30
    while httpx.get(f"{gateway.url}/ready", trust_env=False).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    reply = gateway.client.chat.completions.with_raw_response.create(model="Q4_1-twin", messages=PROMPT, max_tokens=2)
    assert reply.headers["x-bitladder-tier"] == "speed"
    assert gateway.live()["tiers"][1]["restarts"] >= 1


def exchange(url: str, data: bytes, wait_s: float = 2.0) -> bytes:
    """Send raw bytes, and give what comes back until the gateway closes or says nothing more."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                received += piece
    return received


WIRE = {
    "endless header": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 200_000, b"HTTP/1.1 431"),
    "many headers": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 20_000, b"HTTP/1.1 431"),
    "no HTTP": (b"\x16\x03\x01\x02\x00hello\r\n\r\n", b"HTTP/1.1 400"),
    "two lengths": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 400",
    ),
    "length and chunks": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    "path traversal": (
        b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 404",
    ),
    "encoded traversal": (
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 404",
    ),
}


@pytest.mark.parametrize("name", WIRE)
def test_hostile_bytes_get_an_error_and_no_more(gateway, name):
    data, begins = WIRE[name]
    assert exchange(gateway.url, data).startswith(begins)
    assert httpx.get(f"{gateway.url}/health", trust_env=False).status_code == 200


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
PATHS = st.sampled_from(
    ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/metrics"]
) | st.text(st.characters(codec="ascii", exclude_characters=" \r\n\t?#", exclude_categories=["Cc"]), max_size=30).map(
    lambda text: "/" + text
)
NAMES = st.sampled_from(
    ["model", "messages", "prompt", "input", "stream", "max_tokens", "logprobs", "tools", "n", "stop"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.sampled_from(["auto", "nobody"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
BODIES = st.binary(max_size=60) | st.dictionaries(NAMES, JSON, max_size=5).map(lambda told: json.dumps(told).encode())
HEADERS = st.dictionaries(
    st.sampled_from(["x-bitladder-tier", "x-bitladder-tag", "authorization", "origin", "content-type", "accept"]),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20).map(str.strip),
    max_size=3,
)


@given(METHODS, PATHS, HEADERS, BODIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_makes_the_gateway_stumble(gateway, method, path, headers, body):
    """A fuzzer over the HTTP surface: every answer is one of ours, in JSON, and none is an internal error."""
    if b'"nobody"' not in body and b"auto" in body:
        body = body.replace(b"auto", b"nobody")  # the engine need not compute for this
    with httpx.Client(trust_env=False, verify=False, base_url=gateway.url) as client:
        reply = client.request(method, path, headers=headers, content=body)
    assert reply.status_code < 500
    if reply.status_code >= 400 and method != "HEAD" and reply.headers["content-type"] == "application/json":
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize("drain_s", [10, 1])
def test_on_sigterm_nothing_new_is_accepted_and_running_answers_finish_or_are_told_to_be_cut(tmp_path, drain_s):
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for number in range(12 if drain_s > 1 else 1000):
            event = {"model": "slow", "choices": [{"index": 0, "delta": {"content": f"{number} "}}]}
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.1)
        await reply.write(b"data: [DONE]\n\n")
        return reply

    async def read(client: openai.AsyncOpenAI, process: subprocess.Popen) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(model="quality", messages=PROMPT, stream=True):
            if not text:
                process.send_signal(signal.SIGTERM)
            text += chunk.choices[0].delta.content
        return text

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started = contextlib.ExitStack()
        running = await asyncio.to_thread(
            lambda: started.enter_context(served(tmp_path / "log", drain_s, quality={"level": "slow", "url": url}))
        )
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        if drain_s > 1:
            assert await read(client, running.process) == "".join(f"{number} " for number in range(12))
        else:
            with pytest.raises(openai.APIError, match=r"The gateway was stopped\. The answer above is not complete"):
                await read(client, running.process)
        code = await asyncio.to_thread(running.process.wait, 20)
        assert (code == 0) is (drain_s > 1)  # a clean end is no death
        with pytest.raises(openai.APIConnectionError):
            await client.models.list()
        await client.close()
        await asyncio.to_thread(started.close)
        await runner.cleanup()

    asyncio.run(run())


def test_no_engine_outlives_its_gateway(gateway):
    children = psutil.Process(gateway.process.pid).children()
    assert len(children) == 2
    os.kill(gateway.process.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert (len(gone), alive) == (2, [])
