"""A side-car with one page: choose a label, see the image and how long it took.

Triton answers no browser: it sends no CORS headers, and its tensors are no images. This small
server stands beside it and has

    GET  /            the page; needs nothing from any other host
    GET  /api/model   what the sampler is
    POST /api/image   {"label": 7, "seed": 1, "steps": 20, "guidance": 1.5} -> PNG and latency
    GET  /healthz     one real inference: 200 or 503, for liveness probes

What waits for Triton does so in threads: a bounded number for images, one for all that ask for the
model, one for all that ask for health. Each ends by the deadline of its exchanges, or when the page
ends. What a client may hold is bounded in web_limits.py.
"""

import asyncio
import base64
import functools
import hashlib
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, TypeVar

from aiohttp import web

from treeq_export.client.answers import clean
from treeq_export.client.side_car import ImageRequest, SideCar
from treeq_export.client.web_limits import (
    MAX_REQUEST_BYTES,
    Handler,
    Limits,
    RefusedError,
    read_body,
)
from treeq_export.errors import ServeError

__all__ = ["SideCar", "content_security_policy", "make_app", "run_web", "serve_web"]

Result = TypeVar("Result")

_SHUTDOWN_TIMEOUT_S = 2.0  # for answers under way; then their exchanges are aborted
_NUM_AT_WORK = 8  # images that Triton is asked for at a time
_NUM_WAITING = 256  # images that wait for one of these


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Run blocking work in a thread of its own, which does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(done: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            done(value)

    def run() -> None:
        try:
            done, value = future.set_result, work()
        except Exception as error:
            done, value = future.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, done, value)

    threading.Thread(target=run, name="treeq-web", daemon=True).start()
    return await future


class _Shared:
    """Blocking work that runs once at a time: who asks meanwhile gets the same result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._running: asyncio.Task[Any] | None = None

    async def result(self) -> Any:
        """Return the result of the work under way, or of work that is started."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(_in_thread(self._work))
        return await asyncio.shield(self._running)


class _Images:
    """Images that are made at a time, and those that wait."""

    def __init__(self, side_car: SideCar) -> None:
        self._side_car = side_car
        self._at_work = asyncio.Semaphore(_NUM_AT_WORK)
        self._num_waiting = 0

    async def make(self, order: ImageRequest) -> dict[str, Any]:
        """Return an image, once it is its turn.

        Raises:
            RefusedError: Too many wait, or it was not its turn in time.
            ServeError: See `SideCar.image`.
        """
        if self._num_waiting >= _NUM_WAITING:
            raise _busy()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._side_car.timeout_s):
                await self._at_work.acquire()
        except TimeoutError as error:
            raise _busy() from error
        finally:
            self._num_waiting -= 1
        try:
            return await _in_thread(functools.partial(self._side_car.image, order))
        finally:
            self._at_work.release()


def _busy() -> RefusedError:
    return RefusedError(503, "Busy with other images. Ask again later.", {"Retry-After": "5"})


def make_app(side_car: SideCar, limits: Limits | None = None) -> web.Application:
    """Return the application; it closes the side-car at its end.

    Args:
        side_car: Side-car of the Triton server.
        limits: Limits of clients; None is those of a page on this machine.
    """
    page = resources.files("treeq_export.client").joinpath("page.html").read_text("utf-8")
    policy = {"Content-Security-Policy": content_security_policy(page)}
    images, model, health = _Images(side_car), _Shared(side_car.describe), _Shared(side_car.health)
    bounds = limits or Limits("127.0.0.1")

    async def get_page(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=page, content_type="text/html", headers=policy)

    async def get_model(_request: web.Request) -> web.StreamResponse:
        return web.json_response(await model.result())

    async def post_image(request: web.Request) -> web.StreamResponse:
        # A page of another host may post forms here, but no JSON: that needs CORS.
        if request.content_type != "application/json":
            raise RefusedError(415, "Content-Type: expected application/json.")
        order = ImageRequest.model_validate_json(await read_body(request))
        return web.json_response(await images.make(order))

    async def get_health(_request: web.Request) -> web.StreamResponse:
        record = await health.result()
        return web.json_response(record.as_json(), status=200 if record.healthy else 503)

    async def close(_app: web.Application) -> None:
        side_car.close()

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await bounds.answer(request, handler)

    app = web.Application(middlewares=[bounded], client_max_size=MAX_REQUEST_BYTES)
    app.router.add_get("/", get_page)
    app.router.add_get("/api/model", get_model)
    app.router.add_post("/api/image", post_image)
    app.router.add_get("/healthz", get_health)
    app.on_cleanup.append(close)
    return app


def content_security_policy(page: str) -> str:
    """Return the policy that lets a page run its own script and style, and load nothing else."""

    def digests(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks)
        return " ".join(f"'sha256-{each}'" for each in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


async def serve_web(
    side_car: SideCar,
    address: str,
    port: int,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve until `stop` is set.

    Args:
        side_car: Side-car of the Triton server.
        address: Address to listen on.
        port: TCP port to listen on; 0 takes a free one.
        ready: Called with the page's URL.
        stop: Ends it.
        allow_hosts: Names that browsers may know the page by, see `Limits`.

    Raises:
        ServeError: The address cannot be listened on.
    """
    limits = Limits(address, allow_hosts)
    runner = web.AppRunner(
        make_app(side_car, limits), shutdown_timeout=_SHUTDOWN_TIMEOUT_S, **limits.options
    )
    listener: asyncio.Server | None = None
    try:
        await runner.setup()
        try:
            listener = await asyncio.get_running_loop().create_server(
                limits.guard(runner), address, port
            )
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServeError(
                f"{clean(address, 100)}:{port}: cannot listen there ({reason}). "
                "Choose another --port or --address."
            ) from error
        shown = f"[{address}]" if ":" in address else address
        ready(f"http://{shown}:{listener.sockets[0].getsockname()[1]}/")
        await stop.wait()
    finally:
        if listener is not None:
            listener.close()
        side_car_ends = asyncio.get_running_loop().call_later(
            _SHUTDOWN_TIMEOUT_S / 2, side_car.close
        )
        await runner.cleanup()
        side_car_ends.cancel()


def run_web(
    side_car: SideCar,
    address: str,
    port: int,
    ready: Callable[[str], None],
    allow_hosts: Sequence[str] = (),
) -> None:
    """Serve until SIGINT or SIGTERM, a second of which does not wait; see `serve_web`.

    Raises:
        ServeError: The address cannot be listened on.
    """

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def end(number: int) -> None:
            loop.remove_signal_handler(number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number)
        await serve_web(side_car, address, port, ready, stop, allow_hosts)

    asyncio.run(run())
