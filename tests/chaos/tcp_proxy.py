"""A proxy on loopback between a client and a server that speaks HTTP/1.1, which breaks the requests it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Self
from urllib.parse import urlsplit

Fault = Literal[
    "slow",  # passed on after a while
    "reset before",  # the connection is reset, the server hears nothing
    "reset after",  # the server does its work, then the connection is reset
    "half answer",  # the server does its work, half of its answer arrives
    "500 instead",  # an error, the server hears nothing
    "500 after",  # the server does its work, and an error is told
    "503 instead",
    "503 after",
]
FAULTS: tuple[Fault, ...] = Fault.__args__
Choice = Callable[[int, str], Fault | None]
"""Which fault the request gets, by its number (from 1) and its first line; None: none."""

_REASONS = {500: ("Internal Server Error", "InternalError"), 503: ("Service Unavailable", "SlowDown")}


class Message(NamedTuple):
    """A request or an answer."""

    head: bytes  # with the empty line that ends it
    body: bytes

    @property
    def first_line(self) -> str:
        return self.head.partition(b"\r\n")[0].decode("latin-1")

    def field(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.encode():
                return value.strip().decode("latin-1").lower()
        return None


class TcpProxy:
    """Use as a context manager; ``address`` is where clients go."""

    def __init__(self, target: str, *, slow_s: float = 0.05, rename_host: bool = False) -> None:
        """Prepare a proxy.

        Args:
            target: The server's address.
            slow_s: What "slow" means.
            rename_host: Tell the server its own name as Host. Not where the client signs that.
        """
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._slow_s = slow_s
        self._rename_host = rename_host
        self._choose: Choice | None = None
        self._requests = 0
        self.done: list[tuple[Fault, str]] = []
        """The faults so far, each with the request's first line."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    @contextlib.contextmanager
    def breaking(self, choose: Choice) -> Iterator[list[tuple[Fault, str]]]:
        """Break what ``choose`` says, inside the block; gives the list of what was broken in it."""
        self._requests, self.done, self._choose = 0, [], choose
        try:
            yield self.done
        finally:
            self._choose = None

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while (request := await _read_request(client, to_client)) is not None:
                fault = self._fault(request)
                if fault == "slow":
                    await asyncio.sleep(self._slow_s)
                answer = None
                if fault is None or fault == "slow" or fault.endswith("after") or fault == "half answer":
                    server = server or await asyncio.open_connection(*self._target)
                    server[1].write(self._passed_on(request))
                    answer = await _read_answer(server[0], request)
                if not await _give(to_client, answer, fault):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side has gone; so does the other
        finally:
            for writer in (to_client, server and server[1]):
                if writer is not None:
                    writer.close()

    def _fault(self, request: Message) -> Fault | None:
        if self._choose is None:
            return None
        self._requests += 1
        fault = self._choose(self._requests, request.first_line)
        if fault is not None:
            self.done.append((fault, request.first_line))
        return fault

    def _passed_on(self, request: Message) -> bytes:
        head = request.head
        if self._rename_host:
            host = f"Host: {self._target[0]}:{self._target[1]}".encode()
            lines = [host if line.lower().startswith(b"host:") else line for line in head.split(b"\r\n")]
            head = b"\r\n".join(lines)
        return head + request.body


async def _give(to_client: asyncio.StreamWriter, answer: Message | None, fault: Fault | None) -> bool:
    """Answer as the fault wants it; whether the connection goes on."""
    if fault in {None, "slow"}:
        to_client.write(answer.head + answer.body)
        await to_client.drain()
        return (answer.field("connection") or "") != "close"
    if fault.startswith("reset"):
        # Closing with this option sends a reset and no orderly end.
        to_client.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        to_client.transport.abort()
        return False
    if fault == "half answer":
        cut = len(answer.body) // 2
        to_client.write(
            answer.head + answer.body[:cut] if answer.body else answer.head[: len(answer.head) // 2]
        )
    else:
        to_client.write(_error(int(fault[:3])))
    await to_client.drain()
    return False


def _error(status: int) -> bytes:
    reason, code = _REASONS[status]
    body = f"<Error><Code>{code}</Code><Message>made by a test</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
    head = await _read_head(reader)
    if head is None:
        return None
    request = Message(head, b"")
    if request.field("expect") == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return Message(head, await _read_body(reader, request))


async def _read_answer(reader: asyncio.StreamReader, request: Message) -> Message:
    while True:
        head = await _read_head(reader)
        if head is None:
            raise ConnectionResetError
        answer = Message(head, b"")
        status = int(answer.first_line.split()[1])
        if status < 200:
            continue
        if request.first_line.startswith("HEAD ") or status in {204, 304}:
            return answer
        return Message(head, await _read_body(reader, answer))


async def _read_body(reader: asyncio.StreamReader, message: Message) -> bytes:
    """The body as sent; a chunked one with its chunk lines."""
    if message.field("transfer-encoding") != "chunked":
        return await reader.readexactly(int(message.field("content-length") or 0))
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
        body += line + chunk
        if chunk == b"\r\n":
            return body
