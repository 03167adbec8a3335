"""
One outbox in its own process. The first line of its input is its order, and its reply one line.

Run as a folder, as `worker` is: a library with an environment of its own must not find the checkout.
"""

import asyncio
import gc
import importlib
import json
import sys
from time import perf_counter
from typing import Any


async def main(adapter: str) -> None:
    # Only the reply may reach the parent, so the output of a library goes to standard error.
    replies, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.stdin.readline())
    module = importlib.import_module(adapter)
    gc.collect()
    gc.freeze()
    reply = await DO[order.pop("do")](module, **order)
    print(json.dumps(reply), file=replies, flush=True)


async def relay(module: Any, database: str, broker: str, rows: int, keys: int) -> dict[str, float]:
    """Fill the outbox, and relay all of it."""
    async with module.opened(database, broker) as outbox:
        await outbox.fill(rows, keys)
        began = perf_counter()
        await outbox.relay(rows)
        return {"seconds": perf_counter() - began}


async def store(module: Any, database: str, broker: str, rounds: int, transactions: int) -> dict[str, list[float]]:
    """Run transactions with one row of work and one message, in rounds. Return the seconds of one in each round."""
    seconds = []
    async with module.opened(database, broker) as outbox:
        for _ in range(rounds):
            began = perf_counter()
            for number in range(transactions):
                await outbox.store(number)
            seconds.append((perf_counter() - began) / transactions)
    return {"seconds": seconds}


async def other(module: Any, database: str, broker: str, what: str, **options: Any) -> object:
    async with module.opened(database, broker) as outbox:
        return await getattr(outbox, what)(**options)


DO = {"relay": relay, "store": store, "other": other}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
