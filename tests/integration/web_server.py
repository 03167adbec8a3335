"""
Serve HTTP with uvicorn, and consume in the same process: `python -m tests.integration.web_server HOW LOOP`.

The program prints `begun` when its handler has begun a message, which takes a while, and what happens after that.
"""

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass

import uvicorn

from diator.brokers.memory import MemoryMessageBroker
from diator.consumer import Consumer
from diator.events import EventEmitter, EventMap, NotificationEvent


@dataclass(frozen=True, kw_only=True)
class Joined(NotificationEvent):
    user_id: int


events = EventMap()


@events.handler
async def welcome(event: Joined) -> None:
    print("begun", flush=True)
    await asyncio.sleep(0.7)
    print("handled", flush=True)


broker = MemoryMessageBroker()


def a_consumer(number: int) -> Consumer:
    return Consumer(
        broker, event_map=events, group=f"group-{number}", on_handled=lambda done: print(done.outcome, flush=True)
    )


async def run_until_stopped(stack: AsyncExitStack, *, stops: bool = True) -> None:
    """Run a consumer in a task, as a program without `async with consumer` does. With *stops*, the server stops it."""
    consumer = a_consumer(0)
    running = asyncio.create_task(consumer.run())
    await consumer.ready()

    async def end() -> None:
        if stops:
            consumer.stop()
        await running
        print("consumer ended", flush=True)

    stack.push_async_callback(end)


async def enter(stack: AsyncExitStack) -> None:
    stack.callback(print, "consumer ended", flush=True)
    await stack.enter_async_context(a_consumer(0))


async def run_two(stack: AsyncExitStack) -> None:
    other = a_consumer(1)
    other_running = asyncio.create_task(other.run())
    await other.ready()
    stack.push_async_callback(asyncio.wait, {other_running})
    await run_until_stopped(stack)


async def run_and_end(stack: AsyncExitStack) -> None:
    """End the consumer while the server runs on."""
    consumer = a_consumer(0)
    running = asyncio.create_task(consumer.run())
    await consumer.ready()
    consumer.stop()
    await running
    print("consumer ended\nbegun", flush=True)


BEGIN = {"end": run_and_end, "run": run_until_stopped, "enter": enter, "two": run_two}


def application(begin):
    async def app(scope, receive, send):
        assert scope["type"] == "lifespan"
        async with AsyncExitStack() as stack:
            await receive()
            await begin(stack)
            await send({"type": "lifespan.startup.complete"})
            await EventEmitter(message_broker=broker).emit(Joined(user_id=7))
            await receive()
            print("server shuts down", flush=True)
        await send({"type": "lifespan.shutdown.complete"})

    return app


async def nothing(stack: AsyncExitStack) -> None:
    """The consumer of `before` is older than the server."""


async def main(how: str) -> None:
    async with AsyncExitStack() as stack:
        if how == "before":
            await run_until_stopped(stack, stops=False)
        app = application(BEGIN.get(how, nothing))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
        await server.serve()


if __name__ == "__main__":
    if sys.argv[1] == "before":
        asyncio.run(main("before"))
    else:
        app = application(BEGIN[sys.argv[1]])
        uvicorn.run(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on", loop=sys.argv[2])
