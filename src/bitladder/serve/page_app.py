"""The page over a finished run, without a gateway: what ``bitladder page RUN.json`` serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from bitladder.errors import UsageError
from bitladder.serve.whatif import answer_changes, answer_what_if, stored_run

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class PageFiles(StaticFiles):
    """The page's files, with headers that keep foreign content out."""

    def __init__(self) -> None:
        super().__init__(directory=PAGE, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, or 404; 405 only where there is a file."""
        if scope["method"] not in ("GET", "HEAD") and self.lookup_path(path)[1] is None:
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def build_page(run_json: Path) -> Starlette:
    """The page and the run behind it. Answers only to this machine's own names: a foreign site cannot read it.

    Raises:
        BadInput: the file is no run.
    """
    stored_run(run_json)

    async def run(_: Request) -> Response:
        return Response(await asyncio.to_thread(run_json.read_bytes), media_type="application/json")

    async def what_if(request: Request) -> Response:
        return JSONResponse(await answer_what_if(run_json, request.query_params))

    async def answers(_: Request) -> Response:
        return JSONResponse(await answer_changes(run_json))

    return Starlette(
        routes=[
            Route("/bitladder/api/run", run),
            Route("/bitladder/api/what-if", what_if),
            Route("/bitladder/api/answers", answers),
            Mount("/", PageFiles()),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={HTTPException: _told},
    )


async def _told(_: Request, error: Exception) -> Response:
    """An HTTP error in the gateway's shape."""
    assert isinstance(error, HTTPException)
    body = json.dumps({"error": {"message": error.detail, "code": error.status_code}})
    return Response(body, error.status_code, media_type="application/json")


def serve_page(run_json: Path, *, port: int = 0, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the page on the loopback interface until interrupted; ``on_ready`` is told the address.

    Raises:
        BadInput: the file is no run.
        UsageError: the port cannot be listened on.
    """
    import socket

    import uvicorn

    app = build_page(run_json)
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(
            f"The page cannot be served on port {port}: {error.strerror or error}.",
            do="Choose another port with --port, or 0 for any free one.",
        ) from None
    with listener:
        if on_ready is not None:
            on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        config = uvicorn.Config(app, ws="none", lifespan="off", access_log=False, log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])
