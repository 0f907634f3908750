"""A model behind an address: an OpenAI-compatible server that says what a function makes of each prompt."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Said = str | int | bytes


@dataclass
class Cloud:
    """What it says, and what it was asked."""

    say: Callable[[str], Said]
    """Makes an answer, a status, or the raw bytes of a stream from a prompt."""
    model: str = "m"
    asked: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""


@contextmanager
def serving(say: Callable[[str], Said], model: str = "m") -> Iterator[Cloud]:
    """A server on a free port for as long as the context lasts."""
    cloud = Cloud(say, model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body, kind="application/json"):
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(200, json.dumps({"data": [{"id": cloud.model}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            cloud.keys.add(self.headers.get("authorization"))
            prompt = body["messages"][-1]["content"]
            cloud.asked.append(prompt)
            said = cloud.say(prompt)
            if isinstance(said, int):
                self.reply(said, f"no, {self.headers.get('authorization')}".encode())
            elif isinstance(said, bytes):
                self.reply(200, said, "text/event-stream")
            else:
                choice = {"message": {"content": said}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 5, "completion_tokens": 3}
                self.reply(200, json.dumps({"model": cloud.model, "choices": [choice], "usage": usage}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that hang up are part of the tests
    cloud.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
