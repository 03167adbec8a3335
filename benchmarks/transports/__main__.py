"""
One library on one transport, in its own process. The first line of its input is its order.

Run as a folder, as `worker` is: a library with an environment of its own must not find the checkout.
"""

import asyncio
import functools
import gc
import importlib
import json
import sys

from measuring import WORKLOADS


async def main(adapter: str) -> None:
    # Only replies may reach the parent, so the output of a library goes to standard error.
    replies, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.stdin.readline())
    module, opened = importlib.import_module(f"{adapter}_{order['service']}"), order["transport"]
    async with getattr(module, opened)(order["url"], order["name"]) as transport:
        gc.collect()
        gc.freeze()
        write = functools.partial(print, file=replies, flush=True)
        await WORKLOADS[order["do"]](transport, lambda reply: write(json.dumps(reply)), **order["options"])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
