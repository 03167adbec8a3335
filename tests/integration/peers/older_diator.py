"""diator 0.1.2 in its own environment: `older_diator.py send|receive URL PREFIX` sends three events or receives all."""

import asyncio
import json
import sys
from dataclasses import dataclass

from diator.message_brokers.protocol import Message
from diator.message_brokers.redis import RedisMessageBroker
from redis.asyncio import Redis

from diator.events import EventEmitter, EventMap, NotificationEvent


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int


async def send(client: Redis, prefix: str) -> None:
    broker = RedisMessageBroker(client, channel_prefix=prefix)
    emitter = EventEmitter(event_map=EventMap(), container=None, message_broker=broker)
    for user_id in range(3):
        await emitter.emit(UserJoined(user_id=user_id))


async def receive(client: Redis, prefix: str) -> None:
    """Subscribe to a pattern, as users of this version did: it has no consumer."""
    async with client.pubsub() as subscription:
        await subscription.psubscribe(f"{prefix}:notification_event:*")
        async for received in subscription.listen():
            if received["type"] == "psubscribe":
                print("ready", flush=True)
                continue
            message = Message(**json.loads(received["data"]))
            print(message.message_name, message.payload["user_id"], flush=True)


async def main(what: str, url: str, prefix: str) -> None:
    async with Redis.from_url(url) as client:
        await {"send": send, "receive": receive}[what](client, prefix)


asyncio.run(main(*sys.argv[1:]))
