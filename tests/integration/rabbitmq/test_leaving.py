"""A consumer that is cancelled while it joins."""

import asyncio
from uuid import uuid4

from diator.brokers.rabbitmq import _subscription
from diator.brokers.rabbitmq._channel import Channel
from diator.brokers.rabbitmq._client import commands
from diator.brokers.rabbitmq._names import own_queue_name
from tests.integration.rabbitmq.helpers import COUNTED


async def test_a_cancelled_subscription_without_a_group_leaves_nothing(broker, raw, prefix, monkeypatch) -> None:
    """It is cancelled at each request that it makes: neither its queue nor its exchange stays."""
    ask, requests, number, last, own = Channel.ask_now, 0, 0, 0, uuid4()

    def count(channel, frame):
        nonlocal requests
        reply = ask(channel, frame)
        requests += 1
        if requests == last:
            joining.cancel()
        return reply

    async def join() -> None:
        nonlocal last
        async with broker.subscribe([COUNTED], group=None):
            last = 0  # it has joined

    monkeypatch.setattr(Channel, "ask_now", count)
    monkeypatch.setattr(_subscription, "uuid4", lambda: own)
    while number == last:
        number += 1
        requests, last, own = 0, number, uuid4()
        joining = asyncio.create_task(join())
        await asyncio.wait({joining})
        queue = own_queue_name(prefix, COUNTED, own.hex)
        assert not await raw.is_there(_subscription.passively(queue)), number
        assert not await raw.is_there(commands.Exchange.Declare(exchange=f"{queue}:bound", passive=True)), number

    assert number > 10
