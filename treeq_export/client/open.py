"""Opens a connection to a Triton server, over HTTP or gRPC."""

from treeq_export.client.connection import (
    DEFAULT_TIMEOUT_S,
    Connection,
    check_timeout,
    parse_url,
)
from treeq_export.errors import ServeError


def open_connection(url: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> Connection:
    """Open a connection; the server is not asked anything yet.

    Args:
        url: http://host:port or grpc://host:port; host:port alone is HTTP. A user and a password
            in it are sent as basic authentication.
        timeout_s: Longest time of one exchange, more than 0, at most MAX_TIMEOUT_S.

    Returns:
        The connection, to be closed.

    Raises:
        ServeError: A malformed URL, a timeout out of range, or tritonclient is missing.
    """
    address = parse_url(url)
    check_timeout(timeout_s)
    try:
        if address.scheme == "grpc":
            from treeq_export.client.grpc_connection import GrpcConnection

            return GrpcConnection(address, timeout_s)
        from treeq_export.client.http_connection import HttpConnection

        return HttpConnection(address, timeout_s)
    except ImportError as error:
        raise ServeError(
            f"tritonclient cannot be imported ({error}). Install it: "
            "pip install 'treeq-export[serve]'"
        ) from error
