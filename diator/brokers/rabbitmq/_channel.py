"""
A connection to RabbitMQ with one channel.

diator speaks the channel itself. aiormq's own costs a lock, several futures and a task for each message. It
matches returned messages by `message_id` alone. When it closes, it cancels its callers, who cannot distinguish that
from a cancellation by the program.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeAlias

from diator._text import explained
from diator.brokers.rabbitmq._client import (
    CLIENT_ERRORS,
    CONTENT_BODY,
    CONTENT_HEADER,
    FRAME,
    Connection,
    Frame,
    attach,
    channel_max,
    commands,
    detach,
    frame_max,
    major_version,
    marshal,
    unmarshal,
)
from diator.brokers.rabbitmq._content import Deliver

Content: TypeAlias = "Deliver | commands.Basic.Return"

# What the payload of a `Basic.Deliver` begins with: the numbers of its class and its method.
_DELIVER = b"\x00\x3c\x00\x3c"
_CLOSE_TIMEOUT = 2.0
# So many further channels are open at once at most, or as many as RabbitMQ allows if that is less.
_MOST_ASIDE = 50
# RabbitMQ 4.0 loses a quorum queue with its confirmed messages if its node is killed within 1.3 s of the declaration:
# the node has stored by then only that the queue exists. So nothing relies on a quorum queue that is younger than this,
# in seconds.
SAFE_AFTER = 2.0
# Why RabbitMQ closes a channel. PRECONDITION_FAILED: what is declared exists, with other settings.
ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 403, 404, 405, 406


class Lost(ConnectionError):
    """The connection is lost, or was closed here."""


class Refused(Exception):
    """
    RabbitMQ has closed the channel.

    Attributes:
        code: The reason, as a number of AMQP.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


CHANNEL_ERRORS = (*CLIENT_ERRORS, Refused)


class Channel:
    """
    A channel, from `open` until `lost` is called, once. Its connection hands it every frame that it reads for it.

    The frames of one turn of the event loop go out in one write.

    Attributes:
        connection: The connection of aiormq, once it is open.
        error: Why the channel is closed; None while it is open.
        frame_max: The size of the largest frame, in bytes, once it is open.
        version: The major version of RabbitMQ, once it is open.
    """

    NUMBER = 1

    def __init__(self, number: int = NUMBER) -> None:
        self.number = number
        self.error: Exception | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._unwritten: list[bytes] = []
        self._asked: dict[asyncio.Future[Frame], str] = {}  # the requests, each with the name of its reply
        self._method: Content | None = None
        self._header = b""
        self._parts: list[bytes] = []
        self._missing = 0

    async def open(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        """Open the channel on *connection*, and receive its frames."""
        self._loop = asyncio.get_running_loop()
        self.connection = connection
        self._writer = writer
        self.frame_max = frame_max(connection)
        self.version = major_version(connection)
        self._closing = attach(connection, self.number, self)
        self._closing.add_done_callback(self._connection_closed)
        await self.ask(commands.Channel.Open())

    @cached_property
    def _free(self) -> asyncio.Queue[int]:
        """The numbers of further channels that are not open."""
        free = asyncio.Queue[int]()
        first = self.number + 1
        for number in range(first, first + max(1, min(_MOST_ASIDE, channel_max(self.connection) - self.number))):
            free.put_nowait(number)
        return free

    # -- sending -------------------------------------------------------------------------------------------------

    async def ask(self, frame: Frame) -> Any:
        """Send a frame that has a reply, and return that."""
        return await self.ask_now(frame)

    def ask_now(self, frame: Frame) -> asyncio.Future[Frame]:
        """Do that, without waiting for the reply. A refusal closes the channel, whoever waits."""
        if self.error is not None:
            raise self.error
        reply = self._loop.create_future()
        self._asked[reply] = frame.valid_responses[0]
        self.send(frame)
        return reply

    async def ask_aside(self, *frames: Frame) -> None:
        """Ask on a channel of its own, because RabbitMQ may answer by closing the channel."""
        if self._writer is not None:
            other = Channel(await self._free.get())
            try:
                await other.open(self.connection, self._writer)
                for frame in frames:
                    await other.ask(frame)
            finally:
                other.close_channel(then=self._free.put_nowait)

    async def ask_all(self, frames: Iterable[Frame]) -> None:
        """Ask, without waiting for each reply. The first refusal ends it."""
        await asyncio.gather(*map(self.ask, frames))

    async def is_there(self, declared_passively: Frame) -> bool:
        """Return whether the queue or exchange of a passive declaration exists."""
        try:
            await self.ask_aside(declared_passively)
        except Refused as error:
            if error.code == NOT_FOUND:
                return False
            raise
        return True

    def send(self, frame: Frame) -> None:
        """Send a frame that has no reply."""
        self.write(marshal(frame, self.number))

    def write(self, frames: bytes) -> None:
        """Send encoded frames, together with the others of this turn of the event loop."""
        if not self._unwritten:
            self._loop.call_soon(self.flush)
        self._unwritten.append(frames)

    def flush(self) -> None:
        """Send now."""
        frames = b"".join(self._unwritten)
        self._unwritten.clear()
        if frames and self.error is None and self._writer is not None:
            # A write raises RuntimeError once aiormq has ended its half of the connection. Reading reports the loss.
            with suppress(RuntimeError):
                self._writer.write(frames)

    def close_channel(self, then: Callable[[int], None]) -> None:
        """Close the channel, and leave the connection open. Call *then* when its number is free."""

        def end(_: object) -> None:
            self._closing.cancel()
            detach(self.connection, self.number)
            then(self.number)

        if self.error is not None:
            end(None)
            return
        self.ask_now(commands.Channel.Close(200, "", 0, 0)).add_done_callback(end)

    async def close(self) -> None:
        """Close the channel and the connection: in an orderly way, if RabbitMQ takes part in it within 2 seconds."""
        if self._writer is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                if self.error is None:
                    await self.ask(commands.Channel.Close(200, "", 0, 0))
                await self.connection.close()
        except CHANNEL_ERRORS:
            pass  # it is lost already
        finally:
            self.abort(Lost("the connection was closed"))

    def abort(self, error: Exception) -> None:
        """Close the connection at once, because of *error*."""
        self._lose(error)
        if self._writer is not None:
            self._writer.transport.abort()

    # -- receiving -----------------------------------------------------------------------------------------------

    def take_frame(self, kind: int, frame: bytes, /) -> None:
        """Take a frame of this channel. The connection calls this for each."""
        payload = frame[FRAME.size : -1]
        if kind == CONTENT_BODY:
            self._add_part(payload)
        elif kind == CONTENT_HEADER:
            self._header, self._parts, self._missing = payload, [], int.from_bytes(payload[4:12])
            self._add_part(b"")
        elif payload.startswith(_DELIVER):
            self._method = Deliver.read(payload)
        else:
            self._take_method(unmarshal(frame)[2])

    def _take_method(self, frame: Any) -> None:
        if isinstance(frame, commands.Basic.Return):
            self._method = frame
        elif isinstance(frame, commands.Channel.Close):
            self.send(commands.Channel.CloseOk())
            self.flush()
            self._lose(Refused(frame.reply_code or 0, frame.reply_text or "no reason"))
        elif not self.take(frame):
            # A quorum queue may be slow to start a consumer: the replies to later requests overtake that.
            reply = next((reply for reply, name in self._asked.items() if name == frame.name), None)
            if isinstance(frame, commands.Channel.CloseOk) and reply is not next(iter(self._asked), None):
                return  # for the last channel of this number, which RabbitMQ has closed at the same time
            if reply is not None:
                del self._asked[reply]
                if not reply.done():
                    reply.set_result(frame)

    def take(self, frame: Any) -> bool:
        """Handle a frame that is not a reply. Return whether it was such a frame."""
        return False

    def take_content(self, method: Content, header: bytes, body: bytes) -> None:
        """Handle a message that was delivered or returned; *header* is the payload of its content header frame."""

    def lost(self, error: Exception) -> None:
        """Handle the end: no frame arrives any more, and none can be sent."""

    def _add_part(self, part: bytes) -> None:
        self._parts.append(part)
        self._missing -= len(part)
        if self._missing <= 0 and self._method is not None:
            method, self._method = self._method, None
            self.take_content(method, self._header, b"".join(self._parts))

    def _connection_closed(self, closing: asyncio.Future[Any]) -> None:
        if not closing.cancelled():
            error = closing.exception()
            self._lose(Lost(f"the connection is lost ({'closed' if error is None else explained(error)})"))

    def _lose(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            for reply in self._asked:
                if not reply.done():
                    reply.set_exception(error)
                    reply.exception()  # the caller may have been cancelled; then asyncio would complain
            self._asked.clear()
            self.lost(error)
