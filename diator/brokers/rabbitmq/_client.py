"""
The client libraries of RabbitMQ: how diator connects with them, and every internal name of them that it uses.

aiormq connects, logs in, cuts the stream into frames and keeps the heartbeat. pamqp encodes and decodes the frames.
aio-pika is the client that a program may use besides diator; diator accepts its URLs and connections.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, Protocol

from aiormq.connection import Connection, TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import AMQPError
from pamqp import commands
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.exceptions import PAMQPException
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from yarl import URL

from diator._extras import importing, require_internals
from diator._text import without_credentials
from diator.exceptions import ConfigurationError

__all__ = ["URL", "Connection", "ContentBody", "ContentHeader", "Frame", "commands", "marshal"]

# aiormq has no private name that diator uses. These are public, and no documentation promises them.
INTERNALS = {
    "aiormq.connection": (
        "Connection.channels",
        "Connection.close",
        "Connection.closing",
        "Connection.connect",
        "Connection.connection_tune",
        "Connection.ready",
        "TCPTransportFactory.create",
        "TLSTransportFactory.create",
        "TransportFactory",
    ),
    "aiormq.channel": ("Channel.frames",),
}
require_internals("aiormq", INTERNALS)

CLIENT_ERRORS = (AMQPError, PAMQPException, OSError, asyncio.TimeoutError, RuntimeError)

# In seconds, unless the URL has another value. RabbitMQ closes a connection that is silent for two of them.
HEARTBEAT = 10

_FORMS = (
    "pass a URL such as amqp://user:password@host:5672/vhost (amqps:// for TLS), as a str or yarl.URL, "
    "or a connection of aio-pika"
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
            is_known = self._url.scheme in {"amqp", "amqps"} and bool(self._url.host)
            self.heartbeat = int(self._url.query.get("heartbeat", HEARTBEAT))
        except (TypeError, ValueError):
            is_known = False
        if not is_known:
            # Without its cause, whose text may quote the URL and the password in it.
            raise ConfigurationError(f"this is not a URL of RabbitMQ; {_FORMS}") from None
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
        transport = _KeepingWriter(TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory())
        connection = Connection(url, transport_factory=transport, client_properties=properties, **options)
        try:
            await connection.connect()
        except BaseException:  # aiormq connects in a task of its own, which goes on when this one is cancelled
            if transport.writer is not None:
                transport.writer.transport.abort()
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


class _KeepingWriter(TransportFactory):
    writer: asyncio.StreamWriter | None = None

    def __init__(self, made_by: TransportFactory) -> None:
        self._made_by = made_by

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._made_by.create(url, **options)
        return reader, self.writer


def attach(connection: Connection, number: int, channel: object) -> asyncio.Future[Any]:
    """
    Make aiormq await `frames.put` of *channel* for each frame of channel *number*.

    Return a future that is done when the connection ends, with its error if it has one.
    """
    connection.channels[number] = channel  # type: ignore[assignment]  # aiormq only uses its `frames.put`
    closing: asyncio.Future[Any] = connection.closing
    return closing


def frame_max(connection: Connection) -> int:
    """Return the size of the largest frame, in bytes, on which both sides have agreed."""
    return connection.connection_tune.frame_max or 131_072


def is_blocked(connection: Connection) -> bool:
    """Return whether RabbitMQ has stopped reading from publishers because of a resource alarm: memory or disk."""
    waiting = connection.ready()  # aiormq shows it in no other way: this returns at once, or when the alarm is over
    try:
        waiting.send(None)
    except StopIteration:
        return False
    waiting.close()
    return True
