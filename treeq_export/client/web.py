"""A side-car with one page: choose a label, see the image and how long it took.

Triton answers no browser: it sends no CORS headers, and its tensors are no images. This small
server stands beside it and has

    GET  /            the page; needs nothing from any other host
    GET  /api/model   what the sampler is
    POST /api/image   {"label": 7, "seed": 1, "steps": 20, "guidance": 1.5} -> PNG and latency
    GET  /healthz     one real inference: 200 or 503, for liveness probes
"""

import asyncio
import base64
import dataclasses
import hashlib
import queue
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from treeq_export.client.connection import (
    DEFAULT_TIMEOUT_S,
    Connection,
    check_timeout,
    open_connection,
    parse_url,
)
from treeq_export.client.health import check
from treeq_export.client.picture import to_png
from treeq_export.client.request import (
    SAMPLER,
    load_conditioning,
    make_inputs,
    pick_prompt,
    read_info,
    sample,
)
from treeq_export.errors import ServeError, TreeqError
from treeq_export.records.health import HealthRecord

Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_STATUS = {"refused": 400, "failed": 502, "unreachable": 503, "timeout": 504}
_MAX_REQUEST_BYTES = 64 * 1024
_SHUTDOWN_TIMEOUT_S = 5.0  # for answers under way
_NUM_THREADS = 8  # requests that wait for the server at a time


class ImageRequest(BaseModel):
    """Body of POST /api/image; what is left out is the server's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: int | None = None
    prompt: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


class SideCar:
    """What the page asks for, from one Triton server. Its methods block and may run in any thread.

    Args:
        url: The Triton server.
        model: The sampler's name on it.
        timeout_s: Longest wait for an answer.
        conditioning: File with embedded prompts, of a text model.

    Raises:
        ServeError: The URL is malformed.
    """

    def __init__(
        self,
        url: str,
        model: str = SAMPLER,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        conditioning: Path | None = None,
    ) -> None:
        parse_url(url)
        check_timeout(timeout_s)
        self.model = model
        self._url = url
        self._timeout_s = timeout_s
        self._conditioning = conditioning
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Yield a connection that no other thread uses meanwhile."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = open_connection(self._url, self._timeout_s)
        try:
            yield connection
        finally:
            self._idle.put(connection)

    def close(self) -> None:
        """Close all connections."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def describe(self) -> dict[str, Any]:
        """Return the sampler as JSON, asked anew: a server may have loaded another version.

        Raises:
            ServeError: The server cannot be asked.
        """
        with self._connection() as connection:
            info = read_info(connection, self.model)
            num_prompts = None
            if self._conditioning is not None:
                rows = load_conditioning(self._conditioning, info)
                num_prompts = len(next(iter(rows.values())))
            return dataclasses.asdict(info) | {"url": connection.url, "num_prompts": num_prompts}

    def image(self, request: ImageRequest) -> dict[str, Any]:
        """Return one image as JSON: the PNG in base64, its settings, and the latency.

        Raises:
            ServeError: The server refuses or fails.
        """
        with self._connection() as connection:
            info = read_info(connection, self.model)
            rows = None
            if self._conditioning is not None:
                prompts = load_conditioning(self._conditioning, info)
                rows = pick_prompt(prompts, request.prompt or 0)
            inputs = make_inputs(
                info,
                label=request.label,
                seed=request.seed,
                steps=request.steps,
                guidance=request.guidance,
                conditioning=rows,
            )
            response = sample(connection, info, inputs, ["image"])
        pixels = response.arrays["image"][0]
        made = {
            "label": request.label,
            "prompt": request.prompt if rows is not None else None,
            "seed": request.seed,
            "step": int(response.arrays["step"].max()),
            "guidance": info.guidance if request.guidance is None else request.guidance,
            "model": info.model,
            "version": info.version,
        }
        return made | {
            "png": base64.b64encode(to_png(pixels, made, scale=1)).decode(),
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "latency_ms": response.latency_ms,
        }

    def health(self) -> HealthRecord:
        """Return the health of the server, by a real inference."""
        with self._connection() as connection:
            return check(connection, self.model)


def make_app(side_car: SideCar) -> web.Application:
    """Return the application; it closes the side-car at its end."""
    page = resources.files("treeq_export.client").joinpath("page.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="treeq-web")
    probe = ThreadPoolExecutor(1, thread_name_prefix="treeq-web-health")  # never behind images

    async def run(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def get_page(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def get_model(_request: web.Request) -> web.StreamResponse:
        return web.json_response(await run(threads, side_car.describe))

    async def post_image(request: web.Request) -> web.StreamResponse:
        # A page of another host may post forms here, but no JSON: that needs CORS.
        if request.content_type != "application/json":
            return _error(415, "Content-Type: expected application/json.")
        order = ImageRequest.model_validate_json(await request.read())
        return web.json_response(await run(threads, lambda: side_car.image(order)))

    async def get_health(_request: web.Request) -> web.StreamResponse:
        record = await run(probe, side_car.health)
        return web.json_response(record.as_json(), status=200 if record.healthy else 503)

    async def close(_app: web.Application) -> None:
        for pool in (threads, probe):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
        side_car.close()

    app = web.Application(middlewares=[_errors_as_json], client_max_size=_MAX_REQUEST_BYTES)
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


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ServeError as error:
        return _error(_STATUS.get(error.kind, 500), str(error))
    except TreeqError as error:
        return _error(500, str(error))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        return _error(400, f"{where}: {first['msg']}.")


def _error(status: int, line: str) -> web.Response:
    return web.json_response({"error": line}, status=status)


async def serve_web(
    side_car: SideCar,
    address: str,
    port: int,
    ready: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Serve until `stop` is set.

    Args:
        side_car: Of the Triton server.
        address: Where to listen.
        port: Likewise; 0 takes a free one.
        ready: Called with the page's URL.
        stop: Ends it.

    Raises:
        ServeError: The address cannot be listened on.
    """
    runner = web.AppRunner(
        make_app(side_car), access_log=None, shutdown_timeout=_SHUTDOWN_TIMEOUT_S
    )
    try:
        await runner.setup()
        try:
            await web.TCPSite(runner, address, port).start()
        except OSError as error:
            raise ServeError(
                f"{address}:{port}: cannot listen there ({error.strerror or error}). "
                "Choose another --port or --address."
            ) from error
        shown = f"[{address}]" if ":" in address else address
        ready(f"http://{shown}:{runner.addresses[0][1]}/")
        await stop.wait()
    finally:
        await runner.cleanup()


def run_web(side_car: SideCar, address: str, port: int, ready: Callable[[str], None]) -> None:
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
        await serve_web(side_car, address, port, ready, stop)

    asyncio.run(run())
