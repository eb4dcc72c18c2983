"""Whether anything listens at a server's address: seconds to find out, where clients try for minutes."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from hydraopt.errors import ServiceError

_CONNECT_TIMEOUT_S = 5.0


def check_listens(name: str, address: str) -> None:
    """Refuse an address where nothing listens; one that is no web address is a database and is not tried.

    Args:
        name: What should be there, for the message.
        address: Where.

    Raises:
        ServiceError: If no connection is made within five seconds.
    """
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or parts.hostname is None:
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ServiceError(
            f"{name} does not answer at {address} ({error.strerror or error}): "
            "what was done before is kept; start it with `hydraopt up`, or correct its address, and run this again"
        ) from None
