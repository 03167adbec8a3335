"""One connection to NATS, with many requests under way at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Self, TypeAlias
from uuid import UUID

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error

from diator.brokers.pipelining import Pipeline
from diator.exceptions import AccessRefused, BrokerUnavailable, MessageRejected, OutcomeUnknown

_FAILURES = (Error, OSError)
_NOT_READY = {10008, 10023, 10076}  # JetStream is starting, has no resources, or is not enabled


#: How the client connects: the supervisor reconnects, and a message that waits in the client would be lost with it.
ONCE = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0, "pending_size": 0}
Headers: TypeAlias = Mapping[str, str] | None


class Refused(MessageRejected):
    """An error of JetStream. Its text names a limit or a setting, and nothing of a message."""

    err_code: int | None = None


class Link(Pipeline[str]):
    """A connection that never reconnects by itself, and never repeats a request."""

    def __init__(self, retire: Callable[[Any], Any], timeout: float) -> None:
        super().__init__(retire, silence=timeout / 2, max_in_flight=4096)
        self.client: Any = Client()
        self._inbox = self.client.new_inbox()
        self._numbers = count()
        self._connecting = True

    @classmethod
    async def open(
        cls, url: str, timeout: float, options: Mapping[str, Any], retire: Callable[[Any], Any] = id
    ) -> Self:
        link = cls(retire, timeout)
        try:
            async with asyncio.timeout(timeout):
                await link.client.connect(url, connect_timeout=timeout, error_cb=link._on_error, **ONCE, **options)
                link._connecting = False
                link.client._reading_task.add_done_callback(link._on_end)  # noqa: SLF001  # it ends at each loss
                await link.subscribe(f"{link._inbox}.>", link._on_answer)
        except BaseException as error:
            await link.close()
            if "authorization" in str(error).lower():
                raise AccessRefused("NATS refuses the login") from error
            raise
        return link

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Any:
        return await self.client.subscribe(subject, cb=callback, pending_bytes_limit=0)

    async def request(
        self, deadline: float, subject: str, body: bytes = b"", headers: Headers = None, message_id: UUID | None = None
    ) -> Any:
        """Write a request, without waiting before that, and return the answer of JetStream."""
        size = len(body) + sum(len(f"{name}: {value}\r\n".encode()) for name, value in (headers or {}).items()) + 12
        if size > self.client.max_payload + 12 * (headers is None):  # the client compares the body alone
            raise MessageRejected("it is larger than the max_payload of NATS", message_id=message_id)
        key = f"{next(self._numbers)}.{subject or 'echo'}"
        answer = self.expect(key, message_id, size, deadline)
        reply = f"{self._inbox}.{key}"
        try:
            await self.client.publish(subject or reply, body, reply=reply, headers=headers and dict(headers))
        except _FAILURES as error:
            refused = BrokerUnavailable("the connection to NATS is closed")
            refused.__cause__ = error
            self.answered(key, error=refused)
        return await answer

    async def echo(self, deadline: float) -> None:
        """Send a message to this connection itself. It arrives after everything that NATS sent before."""
        await self.request(deadline, "")

    async def api(self, subject: str, timeout: float, **about: Any) -> Any:
        """Ask the API of JetStream. Its errors are `Refused`."""
        body = json.dumps(about).encode() if about else b""
        return await self.request(self._loop.time() + timeout, f"$JS.API.{subject}", body)

    def abort(self) -> None:
        """Break the connection at once."""
        if transport := self.client._transport:  # noqa: SLF001  # its own `close` waits for a peer that does not read
            transport._io_writer.transport.abort()  # noqa: SLF001

    async def close(self) -> None:
        """Leave no socket and no task, also if NATS does not respond."""
        client = self.client
        tasks = [client._reading_task, client._flusher_task, client._ping_interval_task]  # noqa: SLF001  # it awaits none
        tasks += [each._wait_for_msgs_task for each in client._subs.values()]  # noqa: SLF001
        try:
            with suppress(*_FAILURES):
                async with asyncio.timeout(0 if self.is_lost or self._connecting else 0.5):
                    await client.close()
        finally:
            self.lose(OutcomeUnknown("the connection to NATS was closed"))
            self.abort()
            running = [task for task in tasks if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _on_answer(self, message: Msg) -> None:
        key, answer = message.subject.removeprefix(f"{self._inbox}."), None
        error: BrokerUnavailable | Refused | None = None
        if (message.headers or {}).get("Status") == "503":
            error = BrokerUnavailable("NATS has nobody for this subject: no JetStream, no stream or no consumer")
        elif message.data and "error" in (answer := json.loads(message.data)):
            error = self._refusal(key, answer["error"])
        self.answered(key, answer, error=error)

    def _refusal(self, key: str, about: Mapping[str, Any]) -> BrokerUnavailable | Refused:
        text = f"JetStream: {about.get('description')}"
        if about.get("err_code") in _NOT_READY:
            return BrokerUnavailable(text)
        asked = self.in_flight.get(key)
        refused = Refused(text, message_id=asked.message_id if asked else None)
        refused.err_code = about.get("err_code")
        return refused

    async def _on_error(self, error: Exception) -> None:
        if self._connecting:
            raise error  # so that the client makes no second attempt
        text = str(error).lower()
        if "permissions violation for subscription" in text:
            self.lose(AccessRefused("NATS does not let this user read there"))
        elif "permissions violation" in text:
            for key in [key for key in self.in_flight if f'"{key.partition(".")[2].lower()}"' in text]:
                self.answered(key, error=MessageRejected("NATS does not let this user send there"))

    def _on_end(self, reading: asyncio.Task[None]) -> None:
        error: BaseException | None = None if reading.cancelled() else reading.exception()
        why = type(error).__name__ if error else "closed"
        self.lose(OutcomeUnknown(f"the connection to NATS is lost ({why})"))
