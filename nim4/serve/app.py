"""The server on the network: routes, what stands before them, and its life from an open port to the last final text."""

import asyncio
import json
import logging
import socket as sockets
from collections.abc import MutableMapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.utils import ClientDisconnected

from nim4.config import RecipeError, VadConfig
from nim4.serve import steady
from nim4.serve.limits import TENANT, Busy, Gate, Limits, Refused, check_origin, read_keys
from nim4.serve.parts import HERE, Parts, new_service
from nim4.serve.realtime import Connection
from nim4.serve.service import Reception
from nim4.serve.settings import about
from nim4.serve.uploads import transcription
from nim4.serve.web_page import INDEX, page_answer, read_page

UNREAD_MS = 20_000  # ours: the kernel drops a connection whose other end has taken nothing for so long, and what was to be sent there
PATHS = ("/", "/v1/audio/transcriptions", "/v1/realtime", "/v1/about", "/metrics", "/healthz")

log = logging.getLogger("nim4")


def make_app(service: Reception, gate: Gate, origins: Sequence[str] = ()) -> FastAPI:
    """The routes of a server.

    Args:
        origins: web pages of other hosts that may read the answers.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = read_page()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return page_answer(page, INDEX, request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def page_file(request: Request, name: str) -> Response:
        return page_answer(page, name, request)

    @app.get("/v1/about")
    async def about_server() -> Response:
        return JSONResponse(about(service), headers={"cache-control": "no-store"})

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "draining" if service.draining else "ok"}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        return await transcription(request, service)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        connection = Connection(socket, service)
        with service.stream(connection):
            await socket.accept("realtime" if "realtime" in socket.scope["subprotocols"] else None)
            await connection.run()

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        return answer(Refused(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"), str(error.detail)))

    app.add_middleware(Guard, service=service, gate=gate)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["authorization"])
    return app


def answer(refused: Refused) -> Response:
    """An error in OpenAI's shape; in ASCII, since it may name a field of a client's that UTF-8 cannot write."""
    return Response(json.dumps({"error": refused.body}, separators=(",", ":")), refused.status, refused.headers, "application/json")


class Guard:
    """Stands before all routes: turns away what may not come in, limits bodies, counts answers."""

    def __init__(self, app: ASGIApp, service: Reception, gate: Gate):
        self._app, self._service, self._gate = app, service, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, self._limited(receive), counted)
        except Refused as refused:
            await answer(refused)(scope, receive, counted)
            self._service.metrics.count("refused_total", reason=refused.code)
            if scope["type"] == "websocket":
                raise ClientDisconnected from refused  # it has its answer; uvicorn would call it an error of ours that no stream began
        except Busy as busy:
            log.warning("%s: %s", scope["path"], busy)
            await answer(Refused(503, "too_busy", "there is too much to do", retry_after_s=5))(scope, receive, counted)
        except (ClientDisconnect, WebSocketDisconnect):
            log.info("a client vanished before it was served")
        except Exception:  # logged with its traceback; the client gets OpenAI's error instead of a torn connection, other clients notice nothing
            log.exception("%s failed", scope["path"])
            if status:  # too late: the answer has begun
                raise
            await answer(Refused(500, "server_error", "something went wrong in the server"))(scope, receive, counted)
        finally:
            if scope["type"] == "http":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._service.metrics.count("requests_total", path=path, status=status)

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        if scope["path"] in ("/", "/healthz") or scope["path"].startswith("/page/"):
            return  # what everybody may see, also without a key
        headers = Headers(scope=scope)
        scope[TENANT] = self._gate.admit(headers, (scope["client"] or ("unknown",))[0])
        if self._service.draining and scope["path"] != "/metrics":
            raise Refused(503, "draining", "this server is going away", retry_after_s=5)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._service.limits.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """The same messages, as long as their bodies together are not too large: a client need not tell a length, or the true one."""
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._service.limits.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Refused:
        return Refused(413, "body_too_large", f"a request has at most {self._service.limits.max_body_bytes} bytes", "file")


# ---------------------------------------------------------------------------------------------------------------- its life


def open_port(host: str, port: int) -> sockets.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        RecipeError: if the port is taken or the address is none of this machine's.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port < 1 << 16:
        raise RecipeError(where, expected="a port between 0 and 65535", found=port, fix="correct it")
    try:
        family, kind, protocol, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE)[0]
        listening = sockets.socket(family, kind, protocol)
        listening.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)  # a port that was used a moment ago is free
        if hasattr(sockets, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listening.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT, UNREAD_MS)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise RecipeError(where, expected="a free port of this machine", found=error, fix="stop the other server, or use another port") from error
    return listening


class Server(uvicorn.Server):
    """Uvicorn, which on SIGTERM and SIGINT lets streams finish first; a second signal ends it at once."""

    def __init__(self, app: FastAPI, service: Reception):
        limits = service.limits
        pings = {"ws_ping_interval": limits.ping_s, "ws_ping_timeout": limits.ping_s, "ws_max_size": limits.max_message_bytes}
        quiet = {"log_config": None, "access_log": False, "log_level": "warning"}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=round(limits.drain_s) + 1, lifespan="off", **pings, **quiet))
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        """As uvicorn's."""
        self._loop = asyncio.get_running_loop()
        await self._service.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[sockets.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().shutdown(sockets)
        await self._service.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain."""
        if self._service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        log.info("going away: %d streams have %g s to finish", len(self._service.streams), self._service.limits.drain_s)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def serve(
    model: Path,
    device: torch.device,
    precision: str,
    indexes: Sequence[Path],
    address: tuple[str, int],
    keys: Path | None,
    origins: Sequence[str],
    limits: Limits,
    vad: VadConfig,
    parts: Parts = HERE,
) -> None:
    """Serves until a signal comes.

    Args:
        model, device, precision: as load_speech_llm takes them.
        indexes: folders of hotword indexes, which clients name by the folder's name.
        address: host and port.
        keys: file of API keys, see read_keys.
        origins: web pages of other hosts that may use the server.
        vad: how speech is found, where a client does not say it.
        parts: where encoder and language model run.
    Raises:
        RecipeError: if a folder, file or origin is wrong, or the port is taken.
    """
    names = [path.resolve().name for path in indexes]
    if len(set(names)) < len(names):
        raise RecipeError("--hotword-index", expected="folders of different names", found=", ".join(names), fix="rename one")
    for origin in origins:
        check_origin(origin)
    accepted = read_keys(keys)
    with open_port(*address) as listening:  # before the model is read, so that a taken port is told at once
        host, port = listening.getsockname()[:2]
        if not accepted and not host.startswith("127.") and host != "::1":
            log.warning("anyone who can reach this machine can use the server: it has no API keys")
        steady.prepare()
        service = new_service(parts, (model, device, precision), dict(zip(names, indexes, strict=True)), limits, vad)
        service.warm_up()
        app = make_app(service, Gate(accepted, origins, limits.requests_per_minute), origins)
        steady.settle()
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        try:
            Server(app, service).run([listening])
        finally:
            service.close()
        log.info("ended")
