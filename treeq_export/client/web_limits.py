"""What a client of the page may do: how many there are, how long each may take, by which name.

The page has no accounts. What stands between it and others is where it listens, and the name by
which a browser knows it: a foreign page whose name was made to lead here (DNS rebinding) sends its
own name as Host, and is refused. A number cannot be made to lead elsewhere, so numbers are allowed.
"""

import asyncio
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from treeq_export.client.answers import clean
from treeq_export.errors import ServeError, TreeqError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_REQUEST_BYTES = 64 * 1024
ANY_HOST = "*"
_MAX_CONNECTIONS = 512
_HEADERS_WITHIN_S = 10.0  # of a new connection
_BODY_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 30.0  # until the client has taken it
_IDLE_S = 15.0  # between two requests
_LINGER_S = 1.0  # for the rest of a request that was refused
_STATUS = {"refused": 400, "failed": 502, "unreachable": 503, "timeout": 504}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "treeq-export",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)
_NAME = re.compile(r"(?:\[(?P<v6>[^]]*)]|(?P<name>[^:]*))(?::\d*)?")
_log = logging.getLogger(__name__)


class _OneLine(logging.Filter):
    """Makes one line of each malformed request, and none of a client that went away.

    aiohttp logs both with their traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ConnectionError):
            return False
        what = "" if error is None else f": {type(error).__name__}: {error}"
        record.msg, record.args = clean(record.getMessage() + what), ()
        record.exc_info = record.exc_text = None
        return True


_server_log = logging.getLogger(f"{__name__}.server")
_server_log.addFilter(_OneLine())


class RefusedError(Exception):
    """A request that is answered by a line.

    Args:
        status: HTTP status.
        line: The fault and the remedy.
        headers: Further ones.
    """

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.status = status
        self.headers = dict(headers or {})


class _Full(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_BUSY)
        transport.close()


class Limits:
    """The limits of one page.

    Args:
        address: Address that the page listens on; allowed as Host.
        allow_hosts: Further names that are allowed; ANY_HOST allows all.
    """

    def __init__(self, address: str, allow_hosts: Sequence[str] = ()) -> None:
        self._hosts = {each.lower() for each in (address, "localhost", *allow_hosts)}
        self._silent: dict[Any, asyncio.TimerHandle] = {}  # connections without a whole request

    @property
    def options(self) -> dict[str, Any]:
        """Options of aiohttp's runner."""
        return {
            "access_log": None,
            "logger": _server_log,
            "keepalive_timeout": _IDLE_S,
            "lingering_time": _LINGER_S,
            "auto_decompress": False,  # a small body stays small
        }

    def guard(self, runner: web.AppRunner) -> Callable[[], asyncio.Protocol]:
        """Return what makes the protocol of each new connection.

        Args:
            runner: Set up.
        """
        loop = asyncio.get_running_loop()
        server = runner.server
        assert server is not None

        def close(protocol: Any) -> None:
            del self._silent[protocol]
            if protocol.transport is not None:
                protocol.transport.abort()

        def accept() -> asyncio.Protocol:
            if len(server.connections) >= _MAX_CONNECTIONS:
                return _Full()
            protocol: Any = server()
            self._silent[protocol] = loop.call_later(_HEADERS_WITHIN_S, close, protocol)
            return protocol

        return accept

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request: the page's middleware.

        Args:
            request: Request whose headers have arrived.
            handler: Makes the answer.

        Returns:
            The answer, sent; an error is JSON with one line.
        """
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        response = await self._respond(request, handler)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check_host(request.headers.get("Host"))
            return await handler(request)
        except RefusedError as error:
            return _error(error.status, str(error), error.headers)
        except ServeError as error:
            return _error(_STATUS.get(error.kind, 500), str(error))
        except TreeqError as error:
            return _error(500, str(error))
        except ValidationError as error:
            return _error(400, _describe(error))
        except web.HTTPException as error:
            allow = {key: value for key, value in error.headers.items() if key == "Allow"}
            return _error(error.status, f"{error.reason}.", allow)
        except ConnectionError:  # the client is gone
            raise
        except Exception as error:
            line = clean(f"{type(error).__name__}: {error}")
            _log.error("%s %s: %s", request.method, clean(request.path), line)
            return _error(500, f"{line}. This is a fault of the page; its log says the same.")

    def _check_host(self, header: str | None) -> None:
        """Check the name by which a client knows this page; old ones send none."""
        if header is None or ANY_HOST in self._hosts:
            return
        match = _NAME.fullmatch(header)
        name = "" if match is None else (match["v6"] or match["name"] or "")
        if name.lower() in self._hosts:
            return
        try:
            ipaddress.ip_address(name)
        except ValueError as error:
            raise RefusedError(
                403,
                f"Host: received {clean(header, 100)!r}, expected a number or one of "
                f"{', '.join(sorted(self._hosts))}. Start the page with --allow-host NAME.",
            ) from error


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedError: It does not come in time, or is too large.
    """
    try:
        async with asyncio.timeout(_BODY_WITHIN_S):
            return await request.read()
    except TimeoutError as error:
        raise RefusedError(
            408, f"body: not there within {_BODY_WITHIN_S:g} s.", {"Connection": "close"}
        ) from error


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = clean(".".join(map(str, first["loc"])), 100) or "body"
    return f"{where}: {first['msg']}."


def _error(status: int, line: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": line}, status=status, headers=headers)
