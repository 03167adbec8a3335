"""What goes to a partition of Kafka at once, and what has to be known of aiokafka's producer for that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec
from aiokafka import TopicPartition

from diator.brokers.kafka._client import close_client, end_tasks


class Call(msgspec.Struct):
    """A message, and who waits for it."""

    place: TopicPartition
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]] | None
    message_id: UUID | None
    deadline: float
    confirmed: asyncio.Future[None]
    is_alone: bool = False
    """Whether it goes in a batch of its own: with others it was refused, and which one it was Kafka does not say."""


class Batch:
    """
    What goes into one partition at once, and has one confirmation.

    aiokafka takes it for the future of its first message, and knows of no other. Its own `send` does for each message
    what is done here once, and lets its caller wait where a batch is full.
    """

    def __init__(self, producer: Any, first: Call, settle: Callable[[Batch, BaseException | None], None]) -> None:
        self.producer = producer
        self.place = first.place
        self.calls = [first]
        self._settle = settle
        self._builder = producer.create_batch()
        self._queued = producer._message_accumulator._append_batch(self._builder, first.place)  # noqa: SLF001
        self._queued.append(first.key, first.value, None, lambda: self, headers=first.headers)
        self._queued._ttl = math.inf  # noqa: SLF001  # aiokafka would give up a partition without a leader before its time

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return int(self._builder.size())

    @property
    def is_sent(self) -> bool:
        """Whether it was on its way at least once."""
        return bool(self._queued.retry_count)

    def takes(self, call: Call) -> bool:
        """Let *call* go with it, if it is not on its way and has room."""
        # Afterwards aiokafka has counted what is in it, and would give the same numbers to what comes next.
        if self.is_sent or call.is_alone or self.calls[0].is_alone:
            return False
        if self._builder.append(timestamp=None, key=call.key, value=call.value, headers=call.headers) is None:
            return False
        self.calls.append(call)
        return True

    def take_back(self) -> None:
        """See that it is never on its way: of an empty one aiokafka sends nothing. It may just go through its queue."""
        self._queued._builder = self.producer.create_batch()  # noqa: SLF001
        asyncio.get_running_loop().call_soon(self._leave_queue)

    def _leave_queue(self) -> None:
        queues = self.producer._message_accumulator._batches  # noqa: SLF001
        queue = queues.get(self.place, ())
        if self._queued in queue:
            queue.remove(self._queued)
            if not queue:
                del queues[self.place]

    # What aiokafka does with a future:

    def done(self) -> bool:
        return False

    def set_result(self, _: object) -> None:
        self._settle(self, None)

    def set_exception(self, error: BaseException) -> None:
        self._settle(self, error)


def sender_of(producer: Any) -> asyncio.Task[None]:
    """Give the task that does all its work, once it is started."""
    return producer._sender.sender_task  # type: ignore[no-any-return]  # noqa: SLF001


async def tear_down(producer: Any) -> None:
    """End *producer* without sending what it holds: its own `stop` waits until that is delivered."""
    sender = producer._sender  # noqa: SLF001
    # It ends without what it has begun, where that is more than one, and forgets it.
    sending = [task for task in asyncio.all_tasks() if _is_sending(task.get_coro(), sender)]
    await end_tasks([sender.sender_task, *sending])
    await close_client(producer.client)


def _is_sending(coroutine: Any, sender: Any) -> bool:
    if getattr(coroutine, "cr_code", None) is not type(sender)._send_produce_req.__code__:  # noqa: SLF001
        return False
    return coroutine.cr_frame is not None and coroutine.cr_frame.f_locals.get("self") is sender
