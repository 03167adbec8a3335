"""
A connection to RabbitMQ with one channel.

aiormq connects, logs in, cuts the stream into frames and keeps the heartbeat. What is said on a channel is said here:
its own costs a lock, several futures and a task a message, matches returns by `message_id` alone, and when it closes it
cancels whoever waits, which cannot be told from a cancellation by the program.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, TypeAlias

from aiormq.connection import Connection, TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import AMQPError
from pamqp import commands
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.exceptions import PAMQPException
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from yarl import URL

from diator.exceptions import ConfigurationError

__all__ = ["ContentHeader", "Frame", "commands", "marshal"]

Content: TypeAlias = "commands.Basic.Deliver | commands.Basic.Return"

HEARTBEAT = 10
"""In seconds, unless the address says otherwise. After two without a sign the server counts us as dead."""

_GOODBYE = 2.0
_MOST_CHANNELS = 1_000
NOT_ALLOWED, NOT_FOUND, LOCKED, OTHERWISE = 403, 404, 405, 406
"""Why RabbitMQ closes a channel. Otherwise: it is there with other settings."""


class Lost(ConnectionError):
    """The connection is gone, or was given up."""


class Refused(Exception):
    """RabbitMQ has closed the channel, and says why."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


CLIENT_ERRORS = (AMQPError, PAMQPException, OSError, asyncio.TimeoutError, RuntimeError, Refused)


class Address:
    """Where RabbitMQ is, and with which credentials. No `repr` and no error shows them."""

    def __init__(self, url: str, ssl_context: ssl.SSLContext | None) -> None:
        try:
            self._url = URL(url)
            known = self._url.scheme in {"amqp", "amqps"} and bool(self._url.host)
            self.heartbeat = int(self._url.query.get("heartbeat", HEARTBEAT))
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ConfigurationError(
                "that is no address like amqp://user:password@host:5672/vhost, or amqps://…"
            ) from None
        if ssl_context is not None and self._url.scheme != "amqps":
            raise ConfigurationError("an ssl_context needs an address that begins with amqps://")
        self._ssl_context = ssl_context

    async def dial(self, purpose: str) -> tuple[Connection, asyncio.StreamWriter]:
        """Connect, and give what is written to beside the connection: aiormq's own way there is a queue of ten."""
        transport = _KeepingWriter(TLSTransportFactory() if self._url.scheme == "amqps" else TCPTransportFactory())
        name = f"{self._url.query.get('name', 'diator')}: {purpose}"
        url = self._url.update_query({"heartbeat": self.heartbeat, "name": name})
        connection = Connection(url, context=self._ssl_context, transport_factory=transport)
        try:
            await connection.connect()
        except BaseException:  # it runs in a task of aiormq's, which may be done when whoever waits is cancelled
            if transport.writer is not None:
                transport.writer.transport.abort()
            raise
        assert transport.writer is not None, "it is connected"  # noqa: S101
        return connection, transport.writer


class _KeepingWriter(TransportFactory):
    writer: asyncio.StreamWriter | None = None

    def __init__(self, made_by: TransportFactory) -> None:
        self._made_by = made_by

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._made_by.create(url, **options)
        return reader, self.writer


class Channel:
    """
    A channel, from `open` until `lost` is called, once. What its connection reads for it, it is handed frame by frame.

    What is written in one turn of the event loop goes out in one write.
    """

    NUMBER = 1

    def __init__(self, number: int = NUMBER) -> None:
        self.number = number
        self.frames = self  # where aiormq puts the frames of a channel
        self.error: Exception | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._unwritten: list[bytes] = []
        self._asked: deque[asyncio.Future[Frame]] = deque()
        self._content: tuple[Content, ContentHeader, bytearray] | None = None
        self._method: Content | None = None
        self._background = 0

    async def open(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        """Begin to speak, and to listen."""
        self._loop = asyncio.get_running_loop()
        self.connection = connection
        self._writer = writer
        self.frame_max = connection.connection_tune.frame_max or 131_072
        self.heard = self._loop.time()
        connection.channels[self.number] = self  # type: ignore[assignment]  # it needs `frames.put` of it, and no more
        self._closing = connection.closing
        self._closing.add_done_callback(self._connection_closed)
        await self.ask(commands.Channel.Open())

    # -- speaking ------------------------------------------------------------------------------------------------

    async def ask(self, frame: Frame) -> Any:
        """Send what has a reply, and give that. Replies come in the order of the questions."""
        if self.error is not None:
            raise self.error
        reply = self._loop.create_future()
        self._asked.append(reply)
        self.say(frame)
        return await reply

    async def ask_beside(self, frame: Frame) -> None:
        """Ask on another channel, what RabbitMQ may answer by closing it."""
        self._background = self._background % _MOST_CHANNELS + 1
        beside = Channel(self.number + self._background)
        if self._writer is not None:
            try:
                await beside.open(self.connection, self._writer)
                await beside.ask(frame)
            finally:
                beside.part()

    async def is_there(self, declared_passively: Frame) -> bool:
        """Tell whether that is there."""
        try:
            await self.ask_beside(declared_passively)
        except Refused as error:
            if error.code == NOT_FOUND:
                return False
            raise
        return True

    def say(self, frame: Frame) -> None:
        """Send what has no reply."""
        self.write(marshal(frame, self.number))

    def write(self, frames: bytes) -> None:
        """Send with whatever else this turn of the event loop brings."""
        if not self._unwritten:
            self._loop.call_soon(self.flush)
        self._unwritten.append(frames)

    def flush(self) -> None:
        """Send now."""
        if self._unwritten and self.error is None and self._writer is not None:
            self._writer.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def part(self) -> None:
        """Close the channel, and not the connection."""
        if self._writer is None:
            return
        self._closing.cancel()
        if self.error is None:
            self.say(commands.Channel.Close(200, "", 0, 0))

    async def hang_up(self) -> None:
        """Close the channel and the connection: in an orderly way, if the peer takes part in it soon."""
        if self._writer is None:
            return
        try:
            async with asyncio.timeout(_GOODBYE):
                if self.error is None:
                    await self.ask(commands.Channel.Close(200, "", 0, 0))
                await self.connection.close()
        except CLIENT_ERRORS:
            pass  # it is gone already
        finally:
            self.give_up(Lost("the connection was closed"))

    def give_up(self, error: Exception) -> None:
        """Do without the peer."""
        self._lose(error)
        if self._writer is not None:
            self._writer.transport.abort()

    # -- listening -----------------------------------------------------------------------------------------------

    async def put(self, weighted: tuple[int, Any], /) -> None:
        """Take a frame. aiormq awaits this where it would put it into a queue."""
        _, frame = weighted
        self.heard = self._loop.time()
        if isinstance(frame, ContentBody):
            self._part(frame.value)
        elif isinstance(frame, ContentHeader):
            if self._method is not None:
                self._content = self._method, frame, bytearray()
                self._part(b"")
        elif isinstance(frame, (commands.Basic.Deliver, commands.Basic.Return)):
            self._method = frame
        elif isinstance(frame, commands.Channel.Close):
            self.say(commands.Channel.CloseOk())
            self.flush()
            self._lose(Refused(frame.reply_code or 0, frame.reply_text or "no reason"))
        elif not self.take(frame) and self._asked:
            reply = self._asked.popleft()
            if not reply.done():
                reply.set_result(frame)

    def take(self, frame: Any) -> bool:
        """Take what is no reply; say whether it was."""
        return False

    def take_content(self, method: Content, header: ContentHeader, body: bytes) -> None:
        """Take a message."""

    def lost(self, error: Exception) -> None:
        """Nothing more is heard, and nothing more can be said."""

    def _part(self, part: bytes) -> None:
        if self._content is not None:
            method, header, body = self._content
            body += part
            if len(body) >= header.body_size:
                self._content = None
                self.take_content(method, header, bytes(body))

    def _connection_closed(self, closing: asyncio.Future[Any]) -> None:
        if not closing.cancelled():
            self._lose(Lost(f"the connection is gone ({explained(closing.exception())})"))

    def _lose(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            for reply in self._asked:
                if not reply.done():
                    reply.set_exception(error)
                    reply.exception()  # who asked may have gone
            self._asked.clear()
            self.lost(error)


def is_blocked(connection: Connection) -> bool:
    """Tell whether RabbitMQ has stopped reading from publishers: an alarm, memory or disk."""
    waiting = connection.ready()  # aiormq's only way to tell: it returns at once, or when it is over
    try:
        waiting.send(None)
    except StopIteration:
        return False
    waiting.close()
    return True


def explained(error: BaseException | None) -> str:
    """Say what an error of the client is, in one line."""
    return "closed" if error is None else f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
