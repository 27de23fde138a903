"""One Triton server over HTTP or gRPC, behind one interface.

    with open_connection("http://localhost:8000") as connection:  # open.py
        connection.infer("sampler", {"label": ..., "seed": ...}, ["image"])

Both protocols give equal arrays, equal JSON forms of configuration and statistics, and equal
errors: one `ServeError` whose `kind` says whether the server was not reached, did not answer in
time, refused the request, or failed. A connection may go from thread to thread, and be used by one
at a time.
"""

import math
import re
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

from numpy.typing import NDArray

from treeq_export.client.answers import IndexEntry, ModelConfig, Statistics, clean
from treeq_export.errors import ServeError

Arrays = Mapping[str, NDArray[Any]]
Result = TypeVar("Result")

DEFAULT_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 600.0  # an engine of many GB takes minutes to load
MAX_TIMEOUT_S = 86400.0
_MAX_MESSAGE = 4000  # characters of a server's message that are looked at
_HOST = re.compile(r"[\w.:%-]+")
_PATH = re.compile(r"[!-~]*")  # what a request line may hold
_PORTS = {"http": 8000, "grpc": 8001}
# What Triton adds to a message: the request's name, and the Python stack of a model's exception.
_NOISE = re.compile(r"^\[request id: [^]]*\] |\s+At:\s.*", re.DOTALL)


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is.

    Attributes:
        scheme: "http" or "grpc".
        host: Name or number; an IPv6 number without brackets.
        port: TCP port.
        path: Prefix of every path behind a reverse proxy, such as "/triton"; "" mostly.
        user: User of HTTP's basic authentication; "" is none.
        password: Password of HTTP's basic authentication.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    user: str = ""
    password: str = ""

    @property
    def authorization(self) -> str:
        """The header of basic authentication; "" without a user."""
        token = b64encode(f"{self.user}:{self.password}".encode()).decode()
        return f"Basic {token}" if self.user else ""

    @property
    def target(self) -> str:
        """Host and port, "localhost:8000"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, without user and password."""
        return f"{self.scheme}://{self.target}{self.path}"


def parse_url(url: str) -> ServerAddress:
    """Read a server's URL.

    Args:
        url: http://host:port or grpc://host:port; host:port alone is HTTP.

    Returns:
        The address; port 8000 (HTTP) or 8001 (gRPC) where the URL names none.

    Raises:
        ServeError: Another scheme, no host, or no port number.

    Example:
        >>> parse_url("grpc://gpu-7").url
        'grpc://gpu-7:8001'
        >>> parse_url("gpu-7:9000").url
        'http://gpu-7:9000'
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port
    except ValueError:  # of a port that is no number, or brackets that do not close
        raise _wrong_url(url) from None
    if parts.scheme not in _PORTS or not _HOST.fullmatch(host):
        raise _wrong_url(url)
    if not _PATH.fullmatch(parts.path):
        raise _wrong_url(url)
    return ServerAddress(
        scheme=parts.scheme,
        host=host,
        port=port or _PORTS[parts.scheme],
        path=parts.path.rstrip("/"),
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _wrong_url(url: str) -> ServeError:
    shown = re.sub(r"//[^@/]*@", "//", url)
    return refused(
        f"url: received {shown!r}, expected http://host:port or grpc://host:port. "
        "Triton's own ports are 8000 (http) and 8001 (grpc)."
    )


class Connection(ABC):
    """A connection to one server; a context manager.

    Args:
        address: The server's address.
        timeout_s: Longest time of one exchange, from connecting to the last byte of the answer;
            loading a model may take LOAD_TIMEOUT_S.
    """

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._explains = False

    @property
    def url(self) -> str:
        """The server's URL, without user and password."""
        return self.address.url

    @property
    def load_timeout_s(self) -> float:
        """Longest wait for a model to load or unload."""
        return max(self.timeout_s, LOAD_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close it; closing twice is fine."""

    def abort(self) -> None:
        """End what another thread waits for, and close: that thread gets a `ServeError` at once."""
        self.close()

    @abstractmethod
    def is_server_live(self) -> bool:
        """Return whether the server says that it runs.

        Raises:
            ServeError: It says nothing.
        """

    @abstractmethod
    def is_server_ready(self) -> bool:
        """Return whether the server says that all its models are ready; no proof that they work.

        Raises:
            ServeError: It says nothing.
        """

    @abstractmethod
    def is_model_ready(self, model: str) -> bool:
        """Return whether the server says that a model is ready; no proof that it works.

        Raises:
            ServeError: It says nothing.
        """

    def server_version(self) -> str:
        """Return the version that the server names, such as "2.51.0"; "" if it names none.

        Raises:
            ServeError: It says nothing, or not in Triton's form.
        """
        return ""

    @abstractmethod
    def models(self) -> list[IndexEntry]:
        """Return the index of the repository: name and, where loaded, version, state and reason.

        Raises:
            ServeError: Whatever went wrong.
        """

    @abstractmethod
    def model_config(self, model: str) -> ModelConfig:
        """Return a loaded model's configuration, in the JSON form of model_config.proto.

        Raises:
            ServeError: Whatever went wrong.
        """

    @abstractmethod
    def statistics(self, model: str) -> Statistics:
        """Return {"model_stats": [one entry per version]}; counts and nanoseconds are integers.

        Raises:
            ServeError: Whatever went wrong.
        """

    @abstractmethod
    def load(self, model: str) -> None:
        """Load a model, or load it again where its files have changed.

        Raises:
            ServeError: It does not load; one that was loaded before goes on serving.
        """

    @abstractmethod
    def unload(self, model: str) -> None:
        """Unload a model. The server answers before requests under way have ended.

        Raises:
            ServeError: Whatever went wrong.
        """

    @abstractmethod
    def infer(self, model: str, inputs: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run one request.

        Args:
            model: Name of the model.
            inputs: Input name to array with the batch axis.
            outputs: Names of the wanted outputs.

        Returns:
            Output name to array with the batch axis.

        Raises:
            ServeError: Whatever went wrong.
        """

    @abstractmethod
    def stream(
        self, model: str, inputs: Arrays, outputs: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Run one request and yield each of its responses; gRPC only.

        Args:
            model: Name of the model; decoupled, or it gives one response.
            inputs: Input name to array with the batch axis.
            outputs: Names of the wanted outputs.

        Yields:
            Output name to array.

        Raises:
            ServeError: Whatever went wrong; kind "refused" over HTTP.
        """

    # What both protocols share.

    def error(self, kind: str, message: str) -> ServeError:
        """Return the one-line error for what the server said, with a remedy where one is known."""
        line = clean(_NOISE.sub("", message[:_MAX_MESSAGE])).rstrip(".") or "no message"
        return ServeError(f"{self.url}: {line}{self._remedy(line)}", kind=kind)

    def unreachable(self, reason: object) -> ServeError:
        """Return the error for a server that could not be reached."""
        line = clean(str(reason))
        return ServeError(
            f"{self.url}: not reached ({line}). Start the server, or name its address by --url.",
            kind="unreachable",
        )

    def timeout(self, waited_s: float) -> ServeError:
        """Return the error for a server that did not answer in time."""
        return ServeError(
            f"{self.url}: no answer within {waited_s:g} s. Raise --timeout, or look at the "
            "server's queue and log.",
            kind="timeout",
        )

    def checked(self, read: Callable[..., Result], *arguments: Any) -> Result:
        """Return what `read` makes of an answer.

        Raises:
            ServeError: It is of another form than Triton's: `read` raises ValueError.
        """
        try:
            return read(*arguments)
        except ValueError as error:
            raise self.error("failed", f"{error}. Another server?") from error

    def _remedy(self, line: str) -> str:
        """Return how a message ends."""
        if "is not healthy" in line:
            return (
                ". The model's process has died: `treeq-export health --url "
                f"{self.url} --heal` loads it again."
            )
        if "decoupled transaction policy" in line:
            return ". It streams: use grpc:// and `stream`."
        if "unknown model" in line and not self._explains:
            self._explains = True  # a server may say the same when it is asked for its models
            try:
                ready = sorted({m["name"] for m in self.models() if m.get("state") == "READY"})
                return f". The server has {clean(', '.join(ready)) or 'no model loaded'}."
            except ServeError:
                return "."
            finally:
                self._explains = False
        return "" if line.endswith("?") else "."


def refused(message: str) -> ServeError:
    """Return the error for a request that is not sent, since the server would refuse it."""
    return ServeError(message, kind="refused")


def triton_type(name: str, array: NDArray[Any]) -> str:
    """Return Triton's name of the type of an input.

    Raises:
        ServeError: Triton has no such type.
    """
    from tritonclient.utils import np_to_triton_dtype

    datatype = np_to_triton_dtype(array.dtype)
    if datatype is None:
        raise refused(
            f"{name}: received dtype {array.dtype}, which Triton does not have. Convert it to the "
            "data type in the model's config.pbtxt."
        )
    return datatype


def check_timeout(timeout_s: float) -> None:
    """Check the longest time of an exchange.

    Raises:
        ServeError: It is not in (0, MAX_TIMEOUT_S].
    """
    if not (math.isfinite(timeout_s) and 0 < timeout_s <= MAX_TIMEOUT_S):
        raise refused(
            f"timeout_s: received {timeout_s:g}, expected more than 0 and at most "
            f"{MAX_TIMEOUT_S:g} seconds. Repair the option."
        )
