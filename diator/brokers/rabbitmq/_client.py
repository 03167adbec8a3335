"""
The client libraries of RabbitMQ: how diator connects with them, and every internal name of them that it uses.

aiormq connects, logs in and keeps the heartbeat. pamqp encodes and decodes the frames, except for those of messages.
aio-pika is the client that a program may use besides diator; diator accepts its URLs and connections.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Mapping
from typing import Any, Protocol, cast

from aiormq.connection import Connection, TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError
from pamqp import commands
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException
from pamqp.frame import marshal, unmarshal
from pamqp.heartbeat import Heartbeat
from yarl import URL

from diator._extras import importing, require_internals
from diator._text import printable, without_credentials
from diator.brokers.client_logs import demote, own_client
from diator.exceptions import AccessRefused, ConfigurationError

__all__ = ["URL", "Connection", "Frame", "commands", "marshal", "unmarshal"]

# aiormq has no private name that diator uses. These are public, and no documentation promises them.
INTERNALS = {
    "aiormq.connection": (
        "Connection.channels",
        "Connection.close",
        "Connection.closing",
        "Connection.connect",
        "Connection.connection_tune",
        "Connection.ready",
        "Connection.server_properties",
        "TCPTransportFactory.create",
        "TLSTransportFactory.create",
        "TransportFactory",
    ),
}
require_internals("aiormq", INTERNALS)
demote("aiormq.connection", "aiormq.channel")

FRAME = struct.Struct(">BHI")
FRAME_END = b"\xce"
# How many bytes a frame has besides its payload.
FRAME_OVERHEAD = FRAME.size + len(FRAME_END)
METHOD, CONTENT_HEADER, CONTENT_BODY, _HEARTBEATS = 1, 2, 3, 8
_KINDS = frozenset({METHOD, CONTENT_HEADER, CONTENT_BODY, _HEARTBEATS})
_HEARTBEAT = Heartbeat().marshal()
_READ_SIZE = 256 * 1024

_LOGIN_ERRORS = (AuthenticationError, ProbableAuthenticationError)
CLIENT_ERRORS = (AMQPError, PAMQPException, OSError, asyncio.TimeoutError, RuntimeError)

# In seconds, unless the URL has another value. RabbitMQ closes a connection that is silent for two of them.
HEARTBEAT = 10
_MAX_HEARTBEAT = 65_535
# A slash, and a virtual host of at most 255 bytes.
_MAX_PATH = 256
# What the payload of a `Connection.Close` begins with: the numbers of its class and its method.
_CLOSE = b"\x00\x0a\x00\x32"
# Why RabbitMQ lets a user not in: ACCESS_REFUSED and NOT_ALLOWED.
_NOT_LET_IN = (403, 530)

_FORMS = (
    "pass a URL such as amqp://user:password@host:5672/vhost (amqps:// for TLS), as a str or yarl.URL, "
    "or a connection of aio-pika; percent-encode what a user, a password or a virtual host has of /:@?#[]%"
)
# The options that a connection of aio-pika passes to aiormq, besides its URL.
_OPTIONS = ("client_properties", "context", "happy_eyeballs_delay", "interleave")


class AioPikaConnection(Protocol):
    """A connection of aio-pika, as `aio_pika.connect` and `connect_robust` return it, or one not connected yet."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The options that it connects with: the TLS context, and properties of the client."""
        ...

    async def update_secret(self, new_secret: str, *, reason: str = ..., timeout: float | None = ...) -> Any:
        """Renew its password; from then on, new connections of diator log in with that, too."""
        ...


class Address:
    """
    Where RabbitMQ is, and how to log in. No `repr` and no error shows the credentials.

    Raises:
        ConfigurationError: *url* is neither a URL nor a connection of aio-pika, or there are two TLS contexts.

    Attributes:
        heartbeat: Seconds between two heartbeats.
        where: The address, without credentials and options.
    """

    def __init__(self, url: object, ssl_context: ssl.SSLContext | None) -> None:
        self._owner = None if isinstance(url, (str, URL)) else _aio_pika_connection(url)
        self._options: dict[str, Any] = {"context": ssl_context}
        if self._owner is not None:
            if ssl_context is not None:
                raise ConfigurationError("a connection of aio-pika has its own TLS context; do not pass an ssl_context")
            self._options = {name: self._owner.kwargs[name] for name in _OPTIONS if name in self._owner.kwargs}
            url = self._owner.url
        try:
            self._url = URL(url)  # type: ignore[arg-type]  # else a TypeError
            is_known = self._url.scheme in {"amqp", "amqps"} and bool(self._url.host) and self._url.port != 0
            (self._url.host or "").encode("idna")  # as the resolver does
            self.heartbeat = int(self._url.query.get("heartbeat", HEARTBEAT))
            is_known = is_known and 0 <= self.heartbeat <= _MAX_HEARTBEAT
        except (TypeError, ValueError):
            is_known = False
        if not is_known:
            # Without its cause, whose text may quote the URL and the password in it.
            raise ConfigurationError(f"this is not a URL of RabbitMQ; {_FORMS}") from None
        if ",amqp" in self._url.path or len(self._url.path.encode(errors="replace")) > _MAX_PATH:
            raise ConfigurationError(
                "the path of a URL of RabbitMQ names its virtual host, which has at most 255 bytes; for several nodes "
                "pass one name that resolves to all of them, or the address of a load balancer"
            )
        if ssl_context is not None and self._url.scheme != "amqps":
            raise ConfigurationError("an ssl_context needs a URL that starts with amqps://")
        self.where: str = without_credentials(str(self._url.with_query(None)))

    async def dial(self, purpose: str) -> tuple[Connection, asyncio.StreamWriter]:
        """Connect. Return the connection, and the writer behind aiormq's own queue of ten frames."""
        url = self._url if self._owner is None else URL(self._owner.url)  # which has the renewed password
        options = dict(self._options)
        properties = options.pop("client_properties", None) or {}
        name = url.query.get("name") or properties.get("connection_name") or "diator"
        properties = {**properties, "connection_name": f"{name}: {purpose}"}
        url = url.update_query({"heartbeat": self.heartbeat})
        transport = _Transport(TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory())
        connection = Connection(url, transport_factory=transport, client_properties=properties, **options)
        transport.channels = connection.channels
        try:
            with own_client():
                await connection.connect()
        except BaseException as error:
            transport.abort()
            code, reason = transport.reader.refusal if transport.reader is not None else (0, "")
            if isinstance(error, _LOGIN_ERRORS):
                code, reason = _NOT_LET_IN[0], str(error)
            reason = printable(without_credentials(reason))
            if code in _NOT_LET_IN and "limit" not in reason:  # a limit of connections may be free again soon
                raise AccessRefused(
                    f"RabbitMQ at {self.where} does not let this user in ({reason}); check the user, the password and "
                    "the virtual host, and permit the user to use that"
                ) from error
            if reason:
                raise ConnectionRefusedError(reason) from error
            raise
        assert transport.writer is not None, "it is connected"  # noqa: S101
        return connection, transport.writer


def _aio_pika_connection(connection: object) -> Any:
    # A program with such a connection has imported aio-pika before. Its import would cost the others some 15 ms.
    with importing("diator.brokers.rabbitmq", "rabbitmq", "aio_pika"):
        from aio_pika.abc import AbstractConnection  # noqa: PLC0415

    if not isinstance(connection, AbstractConnection) or not isinstance(getattr(connection, "url", None), URL):
        # The error names its type only: its text could be a URL with a password.
        raise ConfigurationError(f"an object of {type(connection).__name__} is not a URL of RabbitMQ; {_FORMS}")
    return connection


class Receiver(Protocol):
    """A channel, as the connection sees it."""

    def take_frame(self, kind: int, frame: bytes, /) -> None:
        """Take a whole frame, of *kind* method, header or body."""
        ...


class _Transport(TransportFactory):
    """Makes what aiormq reads from and writes to, and keeps the reader and the writer."""

    reader: _Reader | None = None
    writer: asyncio.StreamWriter | None = None

    def __init__(self, made_by: TransportFactory) -> None:
        self._made_by = made_by
        self.channels: Mapping[int, Any] = {}
        self._connecting: asyncio.Task[Any] | None = None

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._connecting = asyncio.current_task()
        reader, self.writer = await self._made_by.create(url, **options)
        self.reader = _Reader(reader, self.channels)
        return cast("asyncio.StreamReader", self.reader), self.writer

    def abort(self) -> None:
        """Give up. aiormq connects in a task of its own, which goes on when the task that waits for it is cancelled."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self.writer is not None:
            self.writer.transport.abort()


class _Reader:
    """
    The reader of aiormq, which reads the frames of the connection itself. Those of a channel go to the channel.

    aiormq decodes every frame that it reads, and ends the connection at what pamqp cannot decode: a property, or
    a routing key. RabbitMQ would then redeliver that message for ever. Where aiormq does not see the frames of
    a channel, it sees a heartbeat as a sign of life.

    Attributes:
        refusal: Why RabbitMQ has closed the connection, as a number of AMQP and in words, which aiormq does not tell.
    """

    def __init__(self, reader: asyncio.StreamReader, channels: Mapping[int, Receiver]) -> None:
        self.refusal: tuple[int, str] = 0, ""
        self._reader = reader
        self._channels = channels
        self._arrived = bytearray()
        self._for_aiormq = b""

    def at_eof(self) -> bool:
        return not self._for_aiormq and self._reader.at_eof()

    async def readexactly(self, size: int) -> bytes:
        """Return the next bytes for aiormq. Its `FrameReceiver.get_frame` reads by this method and by no other."""
        while len(self._for_aiormq) < size:
            arrived = await self._reader.read(_READ_SIZE)
            if not arrived:
                raise asyncio.IncompleteReadError(bytes(self._arrived), size)
            self._arrived += arrived
            self._take_frames()
        taken, self._for_aiormq = self._for_aiormq[:size], self._for_aiormq[size:]
        return taken

    def _take_frames(self) -> None:
        at, end = 0, len(self._arrived)
        with memoryview(self._arrived) as arrived:
            while end - at >= FRAME_OVERHEAD:
                kind, number, size = FRAME.unpack_from(arrived, at)
                if kind not in _KINDS:  # not AMQP, or another version of it: aiormq says so
                    self._for_aiormq, at = bytes(arrived), end
                    break
                after = at + size + FRAME_OVERHEAD
                if after > end:
                    break
                frame = bytes(arrived[at:after])
                if frame[-1:] != FRAME_END:
                    raise InvalidFrameError(frame[: FRAME.size])
                at = after
                if not number:
                    self._for_aiormq += frame
                    if frame.startswith(_CLOSE, FRAME.size):
                        close: Any = unmarshal(frame)[2]
                        self.refusal = close.reply_code, close.reply_text
                elif (channel := self._channels.get(number)) is not None:
                    channel.take_frame(kind, frame)
        del self._arrived[:at]
        if at and not self._for_aiormq:
            self._for_aiormq = _HEARTBEAT


def attach(connection: Connection, number: int, channel: Receiver) -> asyncio.Future[Any]:
    """
    Hand each frame of channel *number* to *channel*.

    Return a future that is done when the connection ends, with its error if it has one.
    """
    connection.channels[number] = channel  # type: ignore[assignment]  # aiormq uses it for frames that it sees
    closing: asyncio.Future[Any] = connection.closing
    return closing


def detach(connection: Connection, number: int) -> None:
    """Ignore the frames of channel *number* from now on."""
    connection.channels.pop(number, None)


def channel_max(connection: Connection) -> int:
    """Return how many channels may be open at once."""
    return connection.connection_tune.channel_max or 65_535


def frame_max(connection: Connection) -> int:
    """Return the size of the largest frame, in bytes, on which both sides have agreed."""
    return connection.connection_tune.frame_max or 131_072


def major_version(connection: Connection) -> int:
    """Return the first number of the version of RabbitMQ; 0 if it is another service, which tells none."""
    version = str(connection.server_properties.get("version", "")).partition(".")[0]
    return int(version) if version.isdecimal() else 0


def is_blocked(connection: Connection) -> bool:
    """Return whether RabbitMQ has stopped reading from publishers because of a resource alarm: memory or disk."""
    waiting = connection.ready()  # aiormq shows it in no other way: this returns at once, or when the alarm is over
    try:
        waiting.send(None)
    except StopIteration:
        return False
    waiting.close()
    return True
