"""Free ports on loopback: the same ones every time if nobody else took them."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

from hydraopt.errors import ServiceError

HOST = "127.0.0.1"
GRPC_OFFSET = 10_000
"""SeaweedFS expects the gRPC port of a component this far above its HTTP port."""

_TRIES = 500
_SOCKETS = Path("/tmp")  # noqa: S108 - SeaweedFS's own choice, without a setting


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without this, connections of a server that just died would count as a taken port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(
    preferred: Mapping[str, int], taken: Collection[int] = (), *, with_grpc: bool = False
) -> dict[str, int]:
    """A free port per role.

    Args:
        preferred: Port by role; the next free one above it is used if it is not free.
        taken: Ports to stay away from although they look free: other services keep them.
        with_grpc: For SeaweedFS: also keep the port ``GRPC_OFFSET`` above each one free, and pass over those for
            which another user's SeaweedFS left a socket that we may neither use nor remove.

    Raises:
        ServiceError: If none of the 500 ports from the preferred one on is free.
    """
    chosen: dict[str, int] = {}
    avoid = set(taken)
    for role, first in preferred.items():
        for port in range(first, first + _TRIES):
            pair = {port, port + GRPC_OFFSET} if with_grpc else {port}
            blocked = with_grpc and any(_sockets_of_another_user(each) for each in pair)
            if not pair & avoid and not blocked and all(is_free(each) for each in pair):
                chosen[role] = port
                avoid |= pair
                break
        else:
            raise ServiceError(f"no free port for {role} in {first}..{first + _TRIES - 1} of {HOST}")
    return chosen


def _sockets_of_another_user(port: int) -> bool:
    """Whether a Unix socket that SeaweedFS would use beside ``port`` belongs to somebody else; root may remove it."""
    return os.geteuid() != 0 and any(
        file.lstat().st_uid != os.geteuid() for file in _SOCKETS.glob(f"seaweedfs-*-{port}.sock")
    )
