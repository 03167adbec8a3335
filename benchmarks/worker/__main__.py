"""
One library in its own process, beside the hand-written code. It reads its orders from a pipe.

Run as a folder (`python benchmarks/worker with_kerux:workloads`), which leaves the checkout off the
import path: an older diator has an environment of its own and must not find the new one.
"""

import asyncio
import functools
import gc
import importlib
import json
import random
import sys
from time import perf_counter

import by_hand
from workloads import Repeat


async def serve(adapter: str) -> None:
    # Only replies may reach the parent, so the output of a library goes to standard error.
    replies, sys.stdout = sys.stdout, sys.stderr
    reply = functools.partial(print, file=replies, flush=True)

    module, _, build = adapter.partition(":")
    try:
        measured = getattr(importlib.import_module(module), build)()
    except ModuleNotFoundError as missing:
        reply(json.dumps({"missing": missing.name}))
        return
    reference = by_hand.workloads()
    for workload in [*measured.values(), *reference.values()]:
        await workload.verify()
    # The garbage collector stays on, without scanning the thousands of types of W5 again and again.
    gc.collect()
    gc.freeze()
    reply(json.dumps({"workloads": list(measured)}))

    repetitions: dict[Repeat, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        workload = measured[order["workload"]]
        if "times" in order:
            await workload.repeat(order["times"])
            reply(json.dumps(None))
            continue

        by_side = {"library": workload, "by_hand": reference[order["workload"]]}
        microseconds = {}
        for side in random.sample(list(by_side), k=2):
            repeat, sends = by_side[side].repeat, by_side[side].sends
            if repeat not in repetitions:
                # A thousand types are used once: repeating them alone would keep all of them in the
                # processor's caches, which does not happen in a program.
                repetitions[repeat] = 1 if sends > 1 else await repetitions_in(order["seconds"], repeat)
            microseconds[side] = await seconds_each(repeat, repetitions[repeat]) / sends * 1e6
        reply(json.dumps(microseconds))


async def repetitions_in(seconds: float, repeat: Repeat) -> int:
    """
    Return how often *repeat* runs in about *seconds*, once it is warm.

    The fastest of three runs counts: one that another process interrupted would make every slice too short.
    """
    times = 1
    while times * (each := min([await seconds_each(repeat, times) for _ in range(3)])) < 5 * seconds:
        times *= 2
    return max(1, round(seconds / each))


async def seconds_each(repeat: Repeat, times: int) -> float:
    started = perf_counter()
    await repeat(times)
    return (perf_counter() - started) / times


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
