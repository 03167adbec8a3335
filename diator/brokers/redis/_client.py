"""What the Redis transports share: the client, and its errors as ours."""

from __future__ import annotations

import asyncio
from uuid import UUID

import redis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from diator.exceptions import (
    AccessRefused,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    MessageRejected,
    OutcomeUnknown,
)

Client = redis.asyncio.Redis
RedisConnection = AbstractConnection

NOT_EXECUTED = (
    redis_errors.BusyLoadingError,
    redis_errors.ReadOnlyError,
    redis_errors.MasterDownError,
    redis_errors.TryAgainError,
    redis_errors.AuthenticationError,
    redis_errors.MaxConnectionsError,
    redis_errors.OutOfMemoryError,  # it has no room now, and will have
)
_NOT_NOW = ("BUSY ", "NOREPLICAS ", "MISCONF ")
"""How the errors begin that a server gives until it is otherwise: a script runs, replicas or the disk are missing."""
# Beside its own errors the client lets through what a broken connection does to it, of which redis-py's issues 3546
# and 4287 have examples: AttributeError and TypeError of a writer that is gone, RuntimeError of a closed transport.
CLIENT_ERRORS = (redis_errors.RedisError, OSError, asyncio.TimeoutError, AttributeError, TypeError, RuntimeError)


def send_error(error: BaseException, message_id: UUID | None, *, written: bool) -> BrokerError:
    """Translate an error of the client. *written*: whether the command may have left when it happened."""
    if isinstance(error, BrokerError):
        return error
    problem = f"{type(error).__name__}: {error}"
    if isinstance(error, redis_errors.NoPermissionError) and message_id is None:
        return AccessRefused(f"Redis refuses a subscription ({problem}); let its user do so, by ACL SETUSER")
    if isinstance(error, NOT_EXECUTED) or str(error).startswith(_NOT_NOW) or not written:
        return BrokerUnavailable(f"Redis is not available ({problem})", message_id=message_id)
    if isinstance(error, redis_errors.ResponseError):
        return MessageRejected(f"Redis refused it ({problem})", message_id=message_id)
    return OutcomeUnknown(f"the connection to Redis failed ({problem}); it may have arrived", message_id=message_id)


def client_from_url(url: str, *, timeout: float) -> Client:
    """
    Make a client with the settings that diator relies on, whatever the client library's defaults are.

    It never repeats a command by itself (a publish would go out twice), notices a dead peer, and speaks RESP2: with
    RESP3, redis-py 8 does not see that an idle connection was closed (its issue 4252).
    """
    try:
        client = redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            decode_responses=False,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            client_name="diator",
        )
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # connects to nothing, and refuses options that do not exist
    except (ValueError, TypeError):
        # Not what it says: that quotes the address, and there is a password in it.
        raise ConfigurationError(
            "this is no address of a Redis; it has the form redis://user:password@host:port/db, with special "
            "characters of a password percent-encoded, and options of redis-py behind a question mark"
        ) from None
    return client


def check_client(client: object) -> None:
    """Refuse what is no asynchronous client, when a broker is made rather than when it is first used."""
    if isinstance(client, (redis.Redis, redis.RedisCluster)):
        raise ConfigurationError("this Redis client is synchronous; give a redis.asyncio.Redis")
    if isinstance(client, type) or not callable(getattr(client, "execute_command", None)):
        raise ConfigurationError(
            f"{client!r:.80} is no Redis client; give a redis.asyncio.Redis object, or use from_url"
        )


async def give_back(client: Client, connection: RedisConnection) -> None:
    """
    Close *connection* at once, and return it to the pool of *client*. Nothing of value may be on its way.

    redis-py alone would begin to close it: with TLS that waits for the peer's goodbye, after `aclose` has returned.
    """
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    if writer is not None:
        writer.transport.abort()
    await connection.disconnect(nowait=True)
    await client.connection_pool.release(connection)
