"""redis-py: how its clients are made and used, what its errors mean, and every internal name of it that diator uses."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from inspect import Signature, signature
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast
from urllib.parse import urlsplit
from uuid import UUID

import redis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff

from diator._extras import require_internals
from diator._text import explained
from diator.exceptions import (
    AccessRefused,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    DiatorError,
    MessageRejected,
    OutcomeUnknown,
)

Client = redis.asyncio.Redis
RedisConnection = AbstractConnection

P = ParamSpec("P")
B = TypeVar("B")
C = TypeVar("C")

_FORMS = (
    "pass a redis.asyncio.Redis, or a URL such as redis://user:password@host:port/db (rediss:// for TLS, unix:// "
    "for a socket), with the special characters of a password percent-encoded and options of redis-py after a '?'"
)

# Redis did not execute the command, and will execute it later, or another server will to which the address leads then.
_NOT_NOW = (
    redis_errors.BusyLoadingError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
    redis_errors.MasterDownError,
    redis_errors.TryAgainError,
    redis_errors.AskError,  # and MovedError: another node of a cluster has the key
    redis_errors.MaxConnectionsError,
    redis_errors.OutOfMemoryError,  # consumers and expiry make room
)
# The same, for replies that have no class: a script is running, replicas are missing, the disk fails, the server has
# become a replica, the group was deleted.
_NOT_NOW_PREFIXES = ("BUSY ", "NOREPLICAS ", "MISCONF ", "UNBLOCKED ", "NOGROUP ")
# redis-py raises these replies as if the connection were lost. It is not: the replies after them arrive.
REPLIES = (redis_errors.BusyLoadingError, redis_errors.AuthenticationError)
# These say nothing against the connection: Redis has answered, or the pool has no connection left.
NO_FAULT = (redis_errors.ResponseError, redis_errors.MaxConnectionsError)
# redis-py also lets through what a broken connection does to its own code (its issues 3546 and 4287): AttributeError
# and TypeError because the writer is gone, RuntimeError of a closed transport.
CLIENT_ERRORS = (redis_errors.RedisError, OSError, asyncio.TimeoutError, AttributeError, TypeError, RuntimeError)


# -- clients -----------------------------------------------------------------------------------------------------


def options_of(
    init: Callable[Concatenate[Any, Any, P], None], /
) -> Callable[[Callable[Concatenate[C, ...], B]], Callable[Concatenate[C, str, P], B]]:
    """
    Decorate a class method `from_url(cls, url, /, *args, **options)`, so that it has the options of the constructor.

    Type checkers, editors and `help()` read them from *init*: they are written down once.
    """

    def decorated(function: Any) -> Any:
        class_and_url = [*signature(function).parameters.values()][:2]
        options = [*signature(init).parameters.values()][2:]
        function.__signature__ = Signature([*class_and_url, *options])
        return function

    return decorated


def client_of(client: object, *, timeout: float) -> tuple[Client, bool]:
    """
    Return the client that a broker uses, and whether the broker owns it: a broker closes only a client that it owns.

    Raises:
        ConfigurationError: *client* is neither an asynchronous client nor a URL.
    """
    if isinstance(client, str):
        return _client_from_url(client, timeout=timeout), True
    if isinstance(client, (redis.Redis, redis.RedisCluster)):
        raise ConfigurationError(f"this Redis client is synchronous; {_FORMS}")
    if isinstance(client, type) or not callable(getattr(client, "execute_command", None)):
        # The error names its type only: its text could be a URL with a password.
        what = f"the class {client.__name__}" if isinstance(client, type) else f"an object of {type(client).__name__}"
        raise ConfigurationError(f"{what} is neither a Redis client nor a URL; {_FORMS}")
    return cast("Client", client), False  # or something that sends commands like it: a fake, a cluster


def _client_from_url(url: str, *, timeout: float) -> Client:
    """
    Make a client with the settings that diator needs, whatever the defaults of redis-py are.

    The client never sends a command again by itself (a publish would go out twice), and it notices a dead peer. It
    speaks RESP2: with RESP3, redis-py 8 does not notice that an idle connection was closed (its issue 4252).
    """
    try:
        _check_url(url)
        client = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            decode_responses=False,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        )
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # no I/O; it refuses unknown options
    except (ValueError, TypeError, redis_errors.RedisError):
        # Without its cause, whose text quotes the URL and the password in it.
        raise ConfigurationError(f"this is not a URL of Redis; {_FORMS}") from None
    return client


def _check_url(url: str) -> None:
    """Raise ValueError for what redis-py would ignore, so that the program used another port or another database."""
    url.encode()  # refuses a lone surrogate
    parts = urlsplit(url)
    if parts.port == 0 or (parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path, re.ASCII)):
        raise ValueError


def where(client: Client) -> str:
    """Return the address that *client* connects to, without credentials."""
    pool = _pool_of(client)
    options = getattr(pool, "connection_kwargs", {})
    if "path" in options:
        return f"unix://{options['path']}"
    if "host" in options or type(pool) is redis.asyncio.ConnectionPool:
        host = str(options.get("host", "localhost"))
        return f"{f'[{host}]' if ':' in host else host}:{options.get('port', 6379)}/{options.get('db') or 0}"
    if isinstance(pool, SentinelConnectionPool):
        return f"the server of Sentinel's {pool.service_name}"
    return f"the servers of {type(client).__name__}"  # a fake, a cluster


def require_pool(client: Client) -> None:
    """Raise ConfigurationError if *client* has no pool to take a connection from: such a client can only send."""
    if _pool_of(client) is None:
        raise ConfigurationError(
            f"a {type(client).__name__} has no connection pool, which a subscription needs, so this broker can only "
            "send; subscribe with a broker on a redis.asyncio.Redis"
        )


async def take_connection(client: Client) -> RedisConnection:
    """Take a connection from the pool of *client*: what TLS, Sentinel and credentials need is the client's business."""
    connection: RedisConnection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    return connection


async def subscribing_connection(client: Client, *, within: float) -> RedisConnection:
    """Take a connection for a subscription. It raises an error of diator, *within* so many seconds."""
    try:
        async with asyncio.timeout(within):
            return await take_connection(client)
    except CLIENT_ERRORS as error:
        raise connect_error(error, client, None, within=within) from error


async def release_connection(client: Client, connection: RedisConnection) -> None:
    """Return *connection* to the pool of *client*, open."""
    await client.connection_pool.release(connection)


async def hang_up(connection: RedisConnection, *, within: float) -> None:
    """
    End *connection*, and wait until Redis has ended it too, for *within* seconds at most. Replies are dropped.

    Redis has then executed what was sent on it, and serves no read that waits there. Commands on another connection
    could otherwise overtake that, on the network or in a proxy.
    """
    if (writer := _writer_of(connection)) is not None:
        with suppress(*CLIENT_ERRORS):
            async with asyncio.timeout(within):
                (writer.write_eof if writer.can_write_eof() else writer.close)()  # TLS closes with a message instead
                while True:
                    await read_reply(connection)


async def close_connection(client: Client, connection: RedisConnection) -> None:
    """
    Close *connection* at once, and return it to the pool of *client*. Nothing of value may be on its way.

    redis-py alone would only start to close: with TLS it waits for the peer's closing message after `aclose` has ended.
    """
    if (writer := _writer_of(connection)) is not None:
        writer.transport.abort()
    await connection.disconnect(nowait=True)
    await client.connection_pool.release(connection)


# -- errors ------------------------------------------------------------------------------------------------------


def send_error(error: BaseException, message_id: UUID | None, *, written: bool) -> BrokerError:
    """Translate an error of the client. *written*: whether the command may have left when it happened."""
    if isinstance(error, BrokerError):
        return error
    problem = _problem(error)
    if isinstance(error, redis_errors.AuthenticationError):
        remedy = "check the user and the password of the URL or of the client"
        return AccessRefused(f"Redis does not let this user in ({problem}); {remedy}", message_id=message_id)
    if message_id is None and _is_forbidden(error):
        return AccessRefused(f"Redis refuses a command ({problem}); permit it to this user with ACL SETUSER")
    if not written or _is_temporary(error):
        return BrokerUnavailable(f"Redis is not available ({problem})", message_id=message_id)
    if isinstance(error, redis_errors.ResponseError):
        return MessageRejected(f"Redis refused it ({problem})", message_id=message_id)
    return OutcomeUnknown(f"the connection to Redis failed ({problem}); it may have arrived", message_id=message_id)


def connect_error(error: BaseException, client: Client, message_id: UUID | None, *, within: float) -> DiatorError:
    """Translate an error of connecting, *within* so many seconds. Nothing was sent."""
    if isinstance(error, DiatorError):
        return error
    at, problem = where(client), _problem(error, within=within)
    if isinstance(error, (redis_errors.AuthenticationError, redis_errors.NoPermissionError)):
        remedy = "check the user, the password, and the user's permissions"
        return AccessRefused(f"Redis at {at} does not let this user in ({problem}); {remedy}", message_id=message_id)
    if isinstance(error, redis_errors.ResponseError) and not _is_temporary(error):
        return ConfigurationError(f"Redis at {at} refuses the connection's settings ({problem}); correct the URL")
    if isinstance(error, (redis_errors.InvalidResponse, TimeoutError)):
        problem += "; if that lasts, check that a Redis listens there, and with or without TLS as the URL says"
    return BrokerUnavailable(f"Redis at {at} is not available ({problem})", message_id=message_id)


def _is_forbidden(error: BaseException) -> bool:
    return isinstance(error, redis_errors.NoPermissionError) or str(error).startswith("ACL failure in script")


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, _NOT_NOW) or str(error).startswith(_NOT_NOW_PREFIXES)


def _problem(error: BaseException, *, within: float | None = None) -> str:
    return explained(error, within=within).partition(", with args beginning")[0]  # which may be a message


# -- internals of redis-py ---------------------------------------------------------------------------------------

# Private names, and public ones that its documentation does not have. No other module uses a private one.
INTERNALS = {
    "redis.asyncio.connection": (
        "AbstractConnection._parser",
        "AbstractConnection._re_auth_token",
        "AbstractConnection._writer",
        "AbstractConnection.disconnect",
        "AbstractConnection.read_response",
        "AbstractConnection.send_command",
        "AbstractConnection.send_packed_command",
        "AbstractConnection.should_reconnect",
        "ConnectionPool.get_connection",
        "ConnectionPool.make_connection",
        "ConnectionPool.max_connections",
        "ConnectionPool.release",
    ),
    "redis._parsers": (  # what `AbstractConnection._parser` may be
        "_AsyncHiredisParser.read_response",
        "_AsyncRESP2Parser.read_response",
        "_AsyncRESP3Parser.read_response",
    ),
}
require_internals("redis", INTERNALS)


class Wire(NamedTuple):
    """The ends of a connection that `CommandConnection` uses directly."""

    write: Callable[[bytes], None]
    read: Callable[..., Awaitable[Any]]
    abort: Callable[[], None]


def wire_of(connection: RedisConnection) -> Wire:
    """Return the ends of *connection*. `why_not_shared` must have returned None for it."""
    writer: asyncio.StreamWriter = connection._writer  # type: ignore[assignment]  # noqa: SLF001
    parser: Any = connection._parser  # noqa: SLF001
    return Wire(writer.write, parser.read_response, writer.transport.abort)


async def exchange(connection: RedisConnection, *command: bytes) -> Any:
    """Send *command*, and return its reply undecoded, within the timeouts of the client."""
    await connection.send_command(*command)
    return await connection.read_response(disable_decoding=True)


def send_command(connection: RedisConnection, *command: bytes | str) -> Awaitable[None]:
    """Send *command* and no health check before it, whose reply `read_reply` would take for that of *command*."""
    return connection.send_command(*command, check_health=False)


def read_reply(connection: RedisConnection, *, push: bool = False) -> Awaitable[Any]:
    """
    Wait for the next reply, however long that takes, and return it undecoded. With *push*, return pushed messages, too.

    Cancelled half-way through a reply, this loses nothing: the parts stay in the parser.
    """
    return connection.read_response(
        disable_decoding=True, timeout=math.inf, disconnect_on_error=False, push_request=push
    )


def is_outdated(connection: RedisConnection) -> bool:
    """Return whether another connection should be used: its server moves, or its credentials were renewed."""
    return bool(connection.should_reconnect() or connection._re_auth_token)  # type: ignore[no-untyped-call]  # noqa: SLF001


def pool_size(client: Client) -> int | None:
    """Return how many connections the pool of *client* may have; None if no one pool limits them."""
    pool = _pool_of(client)
    return pool.max_connections if isinstance(pool, redis.asyncio.ConnectionPool) else None  # else a fake's


def _pool_of(client: Client) -> object | None:
    return getattr(client, "connection_pool", None)  # public; a cluster has one for each node, elsewhere


def sends_by_itself(client: Client) -> bool:
    """Return whether *client* has an `execute_command` of its own, as a fake, a cluster and some subclasses have."""
    return getattr(type(client), "execute_command", None) is not Client.execute_command


def execute_by_itself(client: Any, name: bytes, *arguments: bytes) -> Awaitable[Any]:
    """Send a command by the `execute_command` of *client*, and return its reply as it is."""
    # As text, redis-py would know the name, and parse the reply into a shape that depends on version and protocol.
    # A cluster has to know it, to find the node that the command goes to.
    reply: Awaitable[Any] = client.execute_command(name if isinstance(client, Client) else name.decode(), *arguments)
    return reply


def why_not_shared(connection: object) -> str | None:
    """Return why `CommandConnection` cannot use the ends of *connection*, as `wire_of` returns them; None if it can."""
    name = type(connection).__name__
    if not isinstance(connection, RedisConnection):
        return f"the connections of its pool, {name}, are not redis-py's"
    if type(connection).send_packed_command is not RedisConnection.send_packed_command:
        return f"the connections of its pool, {name}, send commands in a way of their own"
    if _writer_of(connection) is None:
        return f"the connections of its pool, {name}, do not write to an asyncio.StreamWriter"
    return None


def _writer_of(connection: object) -> asyncio.StreamWriter | None:
    """Return the writer of *connection*; None if it is closed already, or belongs to a fake."""
    writer = connection._writer if isinstance(connection, RedisConnection) else None  # noqa: SLF001
    return writer if isinstance(writer, asyncio.StreamWriter) else None
