"""The client of Kafka: how it is made, and how it ends without hanging."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any

from diator.brokers.kafka._errors import CLIENT_ERRORS
from diator.exceptions import ConfigurationError

logger: logging.Logger = logging.getLogger(__name__)

_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


# At this level aiokafka logs whole requests and responses. Payloads are in no log, whatever a program listens to.
for _name in ("aiokafka.conn", "aiokafka.producer.producer"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno > logging.DEBUG)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where Kafka is, and who we are there. Its `repr` has no password."""

    bootstrap_servers: tuple[str, ...]
    timeout: float
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    sasl_mechanism: str | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.bootstrap_servers or not all(
            re.fullmatch(r"\[?[^/@\s]+:\d{1,5}", each) for each in self.bootstrap_servers
        ):
            # Not what was given: somebody may have taken it for an URL, with a password in it.
            raise ConfigurationError("this is no address of Kafka; it has the form host:port, or host:port,host:port")
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise ConfigurationError("ssl_context is an ssl.SSLContext, such as ssl.create_default_context() makes")
        if self.sasl_mechanism is not None and self.sasl_mechanism not in _MECHANISMS:
            raise ConfigurationError(f"sasl_mechanism is one of {', '.join(_MECHANISMS)}")
        if len({self.sasl_mechanism is None, self.username is None, self.password is None}) > 1:
            raise ConfigurationError("sasl_mechanism, username and password belong together; give all of them, or none")

    def settings(self, *, request_timeout: float | None = None) -> dict[str, Any]:
        """Give what every client of aiokafka is made with."""
        over = "SASL_" if self.sasl_mechanism else ""
        # One address that does not answer leaves time for the next.
        bounded = self.timeout / len(self.bootstrap_servers) if request_timeout is None else request_timeout
        return {
            "bootstrap_servers": [*self.bootstrap_servers],
            "client_id": "diator",
            "request_timeout_ms": round(bounded * 1000),
            "security_protocol": f"{over}SSL" if self.ssl_context else f"{over}PLAINTEXT",
            "ssl_context": self.ssl_context,
            "sasl_mechanism": self.sasl_mechanism or "PLAIN",
            "sasl_plain_username": self.username,
            "sasl_plain_password": self.password,
        }


# -- ends that do not hang, and forget nothing ---------------------------------------------------------------------

_LEAVING_THE_START = 0.5


async def started(starting: Coroutine[Any, Any, None]) -> None:
    """
    Await *starting*, which connects a client. Whoever is cancelled meanwhile lets it end, for half a second at most.

    aiokafka forgets a connection on which it asks about the cluster while it is cancelled: nobody could close it.
    """
    start = asyncio.create_task(starting)
    try:
        await asyncio.shield(start)
    finally:
        if not start.done():
            await asyncio.wait({start}, timeout=_LEAVING_THE_START)
        await end_tasks([start])


async def close_client(client: Any) -> None:
    """
    Close the connections of a client of aiokafka, whether or not anybody is at the other end.

    Its own way waits for what was written to be taken. What was worth waiting for was waited for before.
    """
    for connection in [*client._conns.values()]:  # noqa: SLF001  # there is no other way to them
        writer = getattr(connection, "_writer", None)
        if writer is not None:
            writer.transport.abort()
    try:
        async with asyncio.timeout(1):
            await client.close()
    except CLIENT_ERRORS as error:
        logger.debug("closing connections to Kafka failed: %r", error)


async def end_tasks(tasks: Collection[asyncio.Task[Any] | None]) -> None:
    """Cancel *tasks* until they have ended: those of aiokafka wait, once cancelled, for others that may never end."""
    given = {task for task in tasks if task is not None}
    running = {task for task in given if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.05)
    for task in given:
        if not task.cancelled():
            task.exception()  # it has been seen
