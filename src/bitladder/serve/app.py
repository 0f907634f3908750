"""The HTTP surface: routes, the page, health, metrics; and `serve`, which runs it until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bitladder import system
from bitladder.errors import EngineError, UsageError
from bitladder.serve.deploy import Deployment, deployed
from bitladder.serve.limits import Doorman, KeyRing
from bitladder.serve.metrics import JsonLines
from bitladder.serve.page_app import PageFiles
from bitladder.serve.processes import Sibling, in_processes
from bitladder.serve.protocol import TASK_MEMBER, error_body, header_text
from bitladder.serve.router import AUTO
from bitladder.serve.settings import LOOPBACK, ServeSettings
from bitladder.serve.whatif import answer_changes, answer_what_if
from bitladder.serve.wire import MAX_CONNECTIONS, CarefulProtocol, Shared
from bitladder.units import KiB

log = logging.getLogger("bitladder.serve")

_ERROR_CODES = {404: "not_found", 405: "method_not_allowed"}
_BACKLOG = 2048
_OTHER_FILES = 256
_LARGE = 256 * KiB
"""Bytes from which on a buffer is given back to the system when it is freed."""
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_GC_ALLOCATIONS = 20_000  # between two looks for cycles; requests leave few


class _Views:
    """What can be read: one method per GET path."""

    def __init__(self, deployment: Deployment, sibling: Sibling | None = None) -> None:
        self._here = deployment
        self._sibling = sibling
        self._started = int(time.time())
        self._created = {tier.name: self._made(tier.spec.path) for tier in deployment.tiers}

    def _made(self, path: Path | None) -> int:
        """When a file was written, Unix time; of an endpoint's model only that it is served from now on is known."""
        try:
            return self._started if path is None else int(path.stat().st_mtime)
        except OSError:
            return self._started

    def routes(self) -> list[BaseRoute]:
        """Path by path."""
        views = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/bitladder/api/live": self.live,
            "/bitladder/api/run": self.run,
            "/bitladder/api/what-if": self.what_if,
            "/bitladder/api/answers": self.answers,
        }
        return [Route(path, view, methods=["GET"]) for path, view in views.items()]

    async def models(self, _: HttpRequest) -> Response:
        """What can be asked for, in OpenAI's shape, with what is behind each name."""
        return JSONResponse({"object": "list", "data": self._listed()})

    async def model(self, request: HttpRequest) -> Response:
        """One of them, by its name in any case."""
        name = request.path_params["name"]
        for model in self._listed():
            if str(model["id"]).lower() == name.lower():
                return JSONResponse(model)
        raise HTTPException(404, f"No model '{header_text(name[:80])}' is served here.")

    def _listed(self) -> list[dict[str, object]]:
        plain = {"object": "model", "owned_by": "bitladder"}
        listed: list[dict[str, object]] = [{"id": AUTO, "created": self._started, **plain}]
        for tier in self._here.tiers:
            about = {
                "tier": tier.name,
                "level": tier.spec.level,
                "file_sha256": tier.spec.sha256 or None,
                "evidence": tier.spec.standing,
            }
            names = (*tier.names[:-1], tier.spec.level)
            created = self._created[tier.name]
            listed += [{"id": name, "created": created, **plain, "bitladder": about} for name in names]
        return listed

    async def health(self, _: HttpRequest) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: HttpRequest) -> Response:
        """Whether both tiers can answer."""
        states = {tier.name: tier.state for tier in self._here.tiers}
        if self._here.ready:
            return JSONResponse({"status": "ready", "tiers": states})
        return JSONResponse({"status": "waiting", "tiers": states}, 503, {"retry-after": "2"})

    async def metrics(self, _: HttpRequest) -> Response:
        """Prometheus text."""
        text = self._here.metrics.text(self._here.tiers)
        if self._sibling is not None:
            text = await self._sibling.together(text)
        return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def live(self, _: HttpRequest) -> Response:
        """What each tier is doing now."""
        here = self._here
        told = here.metrics.live(here.tiers)
        told |= {"name": here.settings.name, "ready": here.ready, "notes": here.notes}
        told["process"] = None if self._sibling is None else self._sibling.number
        told["shadow"] = here.shadow.live() if here.shadow else None
        return JSONResponse(told, headers={"cache-control": "no-store"})

    async def run(self, _: HttpRequest) -> Response:
        """The run behind this deployment, as `bitladder run --json` printed it."""
        return Response(await asyncio.to_thread(self._run_json().read_bytes), media_type="application/json")

    async def what_if(self, request: HttpRequest) -> Response:
        """The run's decision with another memory, context or bar."""
        return JSONResponse(await answer_what_if(self._run_json(), request.query_params))

    async def answers(self, _: HttpRequest) -> Response:
        """What changed in the answers of each level of the run."""
        return JSONResponse(await answer_changes(self._run_json()))

    def _run_json(self) -> Path:
        path = self._here.settings.run_json
        if path is None or not path.is_file():
            raise HTTPException(404, "No run is attached to this gateway.")
        return path


def build_app(deployment: Deployment, sibling: Sibling | None = None) -> ASGIApp:
    """The application over a running deployment, in one of several processes where ``sibling`` says so.

    Raises:
        BadInput: the key file cannot be used.
    """
    settings = deployment.settings
    keys = KeyRing(settings.api_key_file) if settings.api_key_file else None
    hosts = frozenset(host.lower() for host in (*LOOPBACK, settings.host, *settings.allowed_hosts))
    origins = frozenset(settings.allowed_origins)
    views = Starlette(
        routes=_Views(deployment, sibling).routes(),
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    views.router.default = PageFiles()  # a mount would take other methods than GET from the paths above
    views.router.redirect_slashes = False
    app: ASGIApp = Doorman(_either(deployment.gateway, views), hosts, origins, keys)
    if origins:
        app = CORSMiddleware(app, allow_origins=sorted(origins), allow_methods=["*"], allow_headers=["*"])
    return app


def _either(gateway: ASGIApp, views: ASGIApp) -> ASGIApp:
    """The API's requests go straight to the gateway, which answers every error itself: the way through Starlette
    would cost as much as half of what the gateway does with a request.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        to = gateway if scope["type"] == "http" and scope["path"] in TASK_MEMBER else views
        await to(scope, receive, send)

    return app


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = header_text(request.url.path[:80])
    generic = {404: f"There is nothing at {path}.", 405: f"{path} does not take {header_text(request.method[:20])}."}
    is_generic = error.detail in ("Not Found", "Method Not Allowed")
    detail = generic.get(error.status_code, error.detail) if is_generic else error.detail
    body = error_body(detail, _ERROR_CODES.get(error.status_code, "error"), error.status_code)
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")


async def _unexpected(_: HttpRequest, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    body = error_body("Something went wrong inside the gateway.", "internal", 500)
    return Response(body, 500, media_type="application/json")


def serve(settings: ServeSettings, on_ready: Callable[[str, Deployment], None] | None = None) -> None:
    """Start the engines and serve until SIGINT or SIGTERM; running answers may then finish within
    ``drain_s``.

    ``on_ready`` is told the address once requests are accepted.

    Raises:
        UsageError: the address cannot be listened on; several processes where the system has none that share a socket.
        EngineError: an engine does not start, an endpoint serves another model, or answers had to be cut at the end.
    """
    if settings.processes > 1 and not system.CAN_FORK:
        raise UsageError("On Windows a gateway is one process.", do="Leave out --processes.")
    log_to_stderr()
    _allow_files()
    _give_back_large_buffers()
    with _listen(settings.host, settings.port) as listener:
        if settings.processes == 1:
            _run(settings, listener, on_ready)
            return
        with tempfile.TemporaryDirectory(prefix="bitladder-") as folder:
            siblings = [Sibling(Path(folder), number, settings.processes) for number in range(settings.processes)]
            in_processes(siblings, functools.partial(_run_sibling, settings, listener, on_ready))


def _run_sibling(
    settings: ServeSettings,
    listener: socket.socket,
    on_ready: Callable[[str, Deployment], None] | None,
    sibling: Sibling,
    ready: Callable[[], None],
) -> None:
    """One of several processes: the first one says where it serves."""
    first_started = sibling.number == 0 and not sibling.place(0).exists()

    def served(address: str, deployment: Deployment) -> None:
        ready()
        if on_ready is not None and first_started:
            on_ready(address, deployment)

    _run(settings, listener, served, sibling)


def _run(
    settings: ServeSettings,
    listener: socket.socket,
    on_ready: Callable[[str, Deployment], None] | None,
    sibling: Sibling | None = None,
) -> None:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, listener, on_ready, sibling))


def log_to_stderr() -> None:
    """JSON lines on stderr for everything the gateway says; uvicorn's own words only from warnings up."""
    # As the logging module's documentation advises: what no line shows need not be found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("bitladder.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _allow_files() -> None:
    """Let this process have as many open files as its connections need, if it may: two for each request, and more."""
    system.allow_open_files(2 * MAX_CONNECTIONS + _OTHER_FILES)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop, where there is one for this system; asyncio's own (None) elsewhere."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _give_back_large_buffers() -> None:
    """Have glibc map every large buffer by itself. It raises the size from which on it does so to that of the largest
    one freed, up to 32 MiB, and keeps smaller ones in a heap that cannot shrink below the last one in use.
    """
    mallopt = getattr(system.c_library(), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"The gateway cannot listen on {host} port {port}: {error.strerror or error}.",
            means="Another program uses the port, or the address is not this machine's.",
            do="Choose another port with --port, or 0 for any free one.",
        ) from None


async def _serve(
    settings: ServeSettings,
    listener: socket.socket,
    on_ready: Callable[[str, Deployment], None] | None,
    sibling: Sibling | None,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        deployment = await stack.enter_async_context(deployed(settings))
        if sibling is not None:
            sibling.follow_parent()
            counted = functools.partial(deployment.metrics.text, deployment.tiers)
            await stack.enter_async_context(sibling.telling(counted))
        config = uvicorn.Config(
            build_app(deployment, sibling),
            http=CarefulProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        )
        if on_ready is not None:
            host, port = listener.getsockname()[:2]
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", deployment)
        gc.collect()
        gc.freeze()  # what is loaded by now stays; looking through it again and again would stall streams
        gc.set_threshold(_GC_ALLOCATIONS)
        server = _Server(config, one_of_many=sibling is not None)
        await server.serve(sockets=[listener])
    if server.cut:
        raise EngineError(
            f"The gateway was stopped before {server.cut} answers were complete.",
            means=f"They took longer than the {settings.drain_s:g} s that running answers may take to finish.",
        )


class _Server(uvicorn.Server):
    """uvicorn's server, for which being asked to stop is a good end: uvicorn raises the signal again when all is done,
    so that a process whose answers are all complete would look killed.
    """

    cut = 0
    """Requests that were not finished in time."""

    def __init__(self, config: uvicorn.Config, *, one_of_many: bool) -> None:
        super().__init__(config)
        self.server_state = Shared()
        self.one_of_many = one_of_many

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order on the first signal, at once on a second Ctrl-C. One of several processes does not hear what
        comes after its last answer: whoever asks the parent may ask all of them, too, as service managers do.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {}
        for number in signals:
            if self.one_of_many:
                signal.signal(number, self.handle_exit)
                continue
            try:
                loop.add_signal_handler(number, self.handle_exit, number, None)
            except NotImplementedError:  # Windows: the server looks every tenth of a second whether it should stop
                before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number in signals:
                if self.one_of_many:  # in one step: a loop that removes its handler leaves the system's, which kills
                    signal.signal(number, signal.SIG_IGN)
                elif number in before:
                    signal.signal(number, before[number])
                else:
                    loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing new, wait for what runs, and count what must be cut."""
        await super().shutdown(sockets)
        self.cut = len(self.server_state.tasks)
