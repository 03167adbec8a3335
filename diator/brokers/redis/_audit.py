"""What a Redis server keeps of what it has confirmed, and what it may throw away: read from the server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from diator.brokers.audit import Finding
from diator.brokers.capabilities import Durability
from diator.exceptions import AccessRefused, MessageRejected

Execute: TypeAlias = Callable[..., Awaitable[Any]]


async def durability(execute: Execute) -> Durability:
    """Tell what confirmed messages survive on this server."""
    if (await _info(execute, b"persistence")).get("aof_enabled") == "1":
        return "crash"
    return "restart" if await _setting(execute, b"save") else "none"


async def findings(execute: Execute) -> list[Finding]:
    """Tell what of the server's settings weakens streams."""
    server = {**await _info(execute, b"persistence"), **await _info(execute, b"memory")}
    server |= await _info(execute, b"replication")
    found: list[Finding] = []
    if server.get("aof_enabled") != "1":
        problem = "appendonly is no: a crash, or a restart, loses confirmed messages since the last snapshot"
        found.append(Finding(capability="durability", problem=problem, remedy="set appendonly yes"))
    elif (fsync := await _setting(execute, b"appendfsync")) == "no":
        problem = "appendfsync is no: a power cut loses what the system has not written yet, some 30 s"
        found.append(Finding(capability="durability", problem=problem, remedy="set appendfsync everysec, or always"))
    elif fsync is None:
        problem = "CONFIG GET is not permitted, so it is not known how often the log is written to disk"
        found.append(Finding(capability="durability", problem=problem, remedy="permit +config|get, or look there"))
    policy = server.get("maxmemory_policy", "noeviction")
    if server.get("maxmemory", "0") != "0" and policy.startswith("allkeys"):
        problem = f"maxmemory-policy is {policy}: a full server evicts whole streams, unread messages and all"
        found.append(Finding(capability="guarantee", problem=problem, remedy="set maxmemory-policy noeviction"))
    followed = server.get("role") == "master" and server.get("connected_slaves", "0") != "0"
    if followed and await _setting(execute, b"min-replicas-to-write") in ("0", None):
        problem = "there are replicas, and none has to have a message: a failover may lose confirmed ones"
        found.append(Finding(capability="durability", problem=problem, remedy="set min-replicas-to-write 1, or more"))
    return found


async def _info(execute: Execute, section: bytes) -> dict[str, str]:
    text: bytes = await execute(b"INFO", section)
    return {name: value for line in text.decode().splitlines() for name, colon, value in [line.partition(":")] if colon}


async def _setting(execute: Execute, name: bytes) -> str | None:
    """Give a setting; None where it may not be read."""
    try:
        answer: Any = await execute(b"CONFIG", b"GET", name)
    except (AccessRefused, MessageRejected):  # managed services, and careful ones, keep it to themselves
        return None
    pairs = answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
    value: bytes | None = pairs.get(name)
    return None if value is None else value.decode()
