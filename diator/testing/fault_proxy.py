"""A TCP proxy that injects the faults of networks and services, for tests of clients."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Self


class Flow(Enum):
    """One direction of the traffic."""

    TO_SERVER = "to the server"
    TO_CLIENT = "to the client"


BOTH = tuple(Flow)
_CHUNK = 64 * 1024


class FaultProxy:
    """
    A TCP proxy in front of the service at *host* and *port*, with methods that inject faults.

    It listens on the loopback interface inside its `async with` block. A fault affects open and new connections until
    `heal`. `cut` and `reset` end the open connections and leave no fault behind.

    Attributes:
        host: The address that it listens on.
        port: The port that it listens on. 0 before the block means any free port.
        accepted: The number of connections that it has accepted.
        passed: The number of bytes that it has passed on, by direction.
        lost: The number of bytes that a black hole has lost, by direction.
    """

    host: str = "127.0.0.1"

    def __init__(self, host: str, port: int) -> None:
        self.port: int = 0
        self.accepted: int = 0
        self.passed: Counter[Flow] = Counter()
        self.lost: Counter[Flow] = Counter()
        self._service = host, port
        self._listener: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._open = {flow: asyncio.Event() for flow in Flow}
        self._lossy: set[Flow] = set()
        self._latency: tuple[float, float] = (0.0, 0.0)
        self._cuts: dict[Flow, int] = {}
        self._rejects = False

    # -- faults --------------------------------------------------------------------------------------------------

    def withhold(self, *flows: Flow) -> None:
        """Hold back the data in these directions until `heal`. Buffers are bounded, so senders will have to wait."""
        for flow in flows or BOTH:
            self._open[flow].clear()

    def black_hole(self, *flows: Flow) -> None:
        """
        Lose the data in these directions, and the ends of connections too: each side believes that the other is alive.

        A connection that has lost data stays half-open for good; `heal` restores only the others.
        """
        self._lossy.update(flows or BOTH)

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Delay each piece of data by *seconds*, plus or minus a random part of *jitter*, in order, until `heal`."""
        self._latency = seconds, jitter

    def cut_after(self, count: int, flow: Flow) -> None:
        """Break every connection once, as soon as *count* more bytes have gone in the direction of *flow*."""
        self._cuts[flow] = count

    def black_hole_existing(self) -> None:
        """Lose all data of the open connections for good, as a NAT whose entries have expired."""
        for link in self._links.values():
            link.black_holed = True

    def reject(self) -> None:
        """Accept new connections and break each at once, until `heal`, as a load balancer without a backend."""
        self._rejects = True

    def refuse(self) -> None:
        """Refuse new connections until `heal`, as a machine where no service listens."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """Close every connection in an orderly way (FIN). Data that was withheld is lost."""
        for task, link in self._links.items():
            for writer in link.writers:
                writer.close()
            task.cancel()

    def reset(self) -> None:
        """Break every connection (RST), as a machine that has restarted."""
        for task, link in self._links.items():
            for writer in link.writers:
                _reset(writer)
            task.cancel()

    async def heal(self) -> None:
        """Pass on all data and accept new connections again."""
        self._lossy.clear()
        self._cuts.clear()
        self._latency = 0.0, 0.0
        self._rejects = False
        for is_open in self._open.values():
            is_open.set()
        if self._listener is None:
            # Like `asyncio.start_server`, with another class of readers.
            self._listener = await asyncio.get_running_loop().create_server(self._protocol, self.host, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    # -- work ----------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._links)

    @property
    def clients(self) -> int:
        """The number of open connections that their clients have not closed, even if a fault holds that back."""
        return sum(not link.client.has_ended for link in self._links.values())

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        while self._links:
            self.reset()
            await asyncio.wait(self._links)

    def _protocol(self) -> asyncio.Protocol:
        client = _Client()
        return asyncio.StreamReaderProtocol(client, lambda _, writer: self._accept(client, writer))

    def _accept(self, reader: _Client, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._rejects:
            _reset(writer)
            return
        link = _Link(reader, [writer])
        task = asyncio.create_task(self._serve(link, reader, writer), name=f"proxied connection {self.accepted}")
        self._links[task] = link
        task.add_done_callback(self._links.pop)

    async def _serve(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            service_reader, service_writer = await asyncio.open_connection(*self._service)
            link.writers.append(service_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, Flow.TO_SERVER, reader, service_writer))
                pumps.create_task(self._pump(link, Flow.TO_CLIENT, service_reader, writer))
        except* OSError:
            for each in link.writers:
                _reset(each)
        finally:
            for each in link.writers:
                each.close()

    async def _pump(self, link: _Link, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = False
        while True:
            try:
                chunk = await reader.read(_CHUNK)
            except ConnectionError:
                if flow not in self._lossy and not link.black_holed:
                    raise
                chunk = b""
            await self._open[flow].wait()
            await self._wait_out_latency()
            lost = lost or link.black_holed or flow in self._lossy
            if lost:
                self.lost[flow] += len(chunk)
                if not chunk:
                    await asyncio.Event().wait()  # until the connection is ended
            elif chunk:
                await self._pass(flow, chunk, writer)
            else:
                writer.write_eof()
                return

    async def _wait_out_latency(self) -> None:
        seconds, jitter = self._latency
        if seconds or jitter:
            await asyncio.sleep(max(0.0, random.uniform(seconds - jitter, seconds + jitter)))  # noqa: S311

    async def _pass(self, flow: Flow, chunk: bytes, writer: asyncio.StreamWriter) -> None:
        allowed = self._cuts.get(flow, len(chunk) + 1)
        writer.write(chunk[:allowed])
        self.passed[flow] += len(chunk[:allowed])
        await writer.drain()
        if flow in self._cuts:
            self._cuts[flow] -= len(chunk)
            if self._cuts[flow] <= 0:
                del self._cuts[flow]
                await asyncio.sleep(0.005)  # a reset discards data that the peer has not read yet
                self.reset()


@dataclass
class _Link:
    """A connection to a client, with its connection to the service."""

    client: _Client
    writers: list[asyncio.StreamWriter]
    black_holed: bool = False


class _Client(asyncio.StreamReader):
    """What a client sends. Unlike `at_eof`, `has_ended` does not wait until all of it was read."""

    has_ended: bool = False

    def feed_eof(self) -> None:
        self.has_ended = True
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        self.has_ended = True
        super().set_exception(exc)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close abruptly: without time to linger, the system sends RST."""
    if not writer.transport.is_closing():
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
