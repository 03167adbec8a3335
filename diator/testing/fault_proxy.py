"""A TCP proxy that fails as networks and services do: for tests of what a client makes of it."""

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
    Passes bytes between its clients and the service at *host* and *port*, until it is told to do worse.

    It listens on `port` of the loopback interface for as long as `async with` lasts. A fault holds for all
    connections, those to come too, until `heal`; `cut` and `reset` end those that there are and leave no fault behind.

    Attributes:
        host, port: Where it listens.
        accepted: How many connections it has accepted.
        passed: How many bytes it has passed on, by direction.
        lost: How many bytes a black hole has taken, by direction.
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
        """Keep what goes in these directions until `heal`. Senders come to feel it: what is kept has its bounds."""
        for flow in flows or BOTH:
            self._open[flow].clear()

    def black_hole(self, *flows: Flow) -> None:
        """
        Lose what goes in these directions, the ends of connections too: each side believes that the other lives.

        A connection that has lost something stays half-open for good; `heal` helps only the others.
        """
        self._lossy.update(flows or BOTH)

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Pass on each piece *seconds* later, up to *jitter* more or less at random, in its order, until `heal`."""
        self._latency = seconds, jitter

    def cut_after(self, count: int, flow: Flow) -> None:
        """Break every connection as soon as *count* more bytes have gone in the direction of *flow*, once."""
        self._cuts[flow] = count

    def black_hole_existing(self) -> None:
        """Lose for good what goes through the connections that there are, as a NAT does that has forgotten them."""
        for link in self._links.values():
            link.forgotten = True

    def reject(self) -> None:
        """Accept new connections and break each at once, until `heal`: as a balancer does with nobody behind it."""
        self._rejects = True

    def refuse(self) -> None:
        """Refuse new connections, as a machine does where no service listens."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def cut(self) -> None:
        """End every connection in an orderly way (FIN). What was withheld is lost."""
        for task, link in self._links.items():
            for writer in link.writers:
                writer.close()
            task.cancel()

    def reset(self) -> None:
        """Break every connection (RST), as a machine does that has forgotten them."""
        for task, link in self._links.items():
            for writer in link.writers:
                _reset(writer)
            task.cancel()

    async def heal(self) -> None:
        """Accept and pass on everything again."""
        self._lossy.clear()
        self._cuts.clear()
        self._latency = 0.0, 0.0
        self._rejects = False
        for is_open in self._open.values():
            is_open.set()
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, self.host, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    # -- work ----------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._links)

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        while self._links:
            self.reset()
            await asyncio.wait(self._links)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._rejects:
            _reset(writer)
            return
        link = _Link([writer])
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
                if flow not in self._lossy and not link.forgotten:
                    raise
                chunk = b""
            await self._open[flow].wait()
            await self._travel()
            lost = lost or link.forgotten or flow in self._lossy
            if lost:
                self.lost[flow] += len(chunk)
                if not chunk:
                    await asyncio.Event().wait()  # until somebody ends this connection
            elif chunk:
                await self._pass(flow, chunk, writer)
            else:
                writer.write_eof()
                return

    async def _travel(self) -> None:
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
                await asyncio.sleep(0.005)  # a reset overtakes what the peer has not read
                self.reset()


@dataclass
class _Link:
    """A connection to a client, and the one to the service that belongs to it."""

    writers: list[asyncio.StreamWriter]
    forgotten: bool = False


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close without a goodbye: with no time to linger, the system sends RST."""
    if not writer.transport.is_closing():
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
