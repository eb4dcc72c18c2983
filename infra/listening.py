"""Whether anything listens at a server's address: seconds to find out, where clients try for minutes."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from hydraopt.errors import ServiceError

WEB_SCHEMES = ("http", "https")
CLUSTER_SCHEMES = ("dask", "ray")
_CONNECT_TIMEOUT_S = 5.0


def check_listens(name: str, address: str, start: str = "`hydraopt up`") -> None:
    """Refuse an address where nothing listens. A database, neither web address nor cluster, is not tried.

    Args:
        name: What should be there, for the message.
        address: Where.
        start: What starts it, for the message.

    Raises:
        ServiceError: If no connection is made within five seconds.
    """
    parts = urlsplit(address)
    if parts.scheme not in WEB_SCHEMES + CLUSTER_SCHEMES or parts.hostname is None:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ServiceError(
            f"{name} does not answer at {address} ({error.strerror or error}): "
            f"what was done before is kept; start it with {start}, or correct its address, and run this again"
        ) from None
