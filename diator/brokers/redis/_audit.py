"""Whether a Redis server may lose confirmed messages: asked from the server itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from diator._text import counted
from diator.brokers.audit import Finding
from diator.brokers.capabilities import Durability
from diator.exceptions import AccessRefused, ConfigurationError, MessageRejected

Execute: TypeAlias = Callable[..., Awaitable[Any]]


async def durability(execute: Execute) -> Durability:
    """Return what confirmed messages survive on this server."""
    if (await _info(execute, b"persistence")).get("aof_enabled") == "1":
        return "crash"
    return "restart" if await _setting(execute, b"save") else "none"


async def findings(execute: Execute, replicas: int) -> list[Finding]:
    """Return the settings of the server that weaken what Redis Streams promise, with sends that wait for *replicas*."""
    server = {**await _info(execute, b"persistence"), **await _info(execute, b"memory")}
    server |= await _info(execute, b"replication")
    found: list[Finding] = []
    if server.get("aof_enabled") != "1":
        problem = "appendonly is no: a crash or a restart loses the messages confirmed since the last snapshot"
        found.append(Finding(capability="durability", problem=problem, remedy="set appendonly yes"))
    elif (fsync := await _setting(execute, b"appendfsync")) == "no":
        problem = "appendfsync is no: a power cut loses what the system has not yet written, about 30 s of messages"
        found.append(Finding(capability="durability", problem=problem, remedy="set appendfsync everysec or always"))
    elif fsync is None:
        problem = "CONFIG GET is not permitted, so diator cannot read how often the log is written to disk"
        found.append(
            Finding(
                capability="durability", problem=problem, remedy="permit +config|get, or check appendfsync yourself"
            )
        )
    policy = server.get("maxmemory_policy", "noeviction")
    if server.get("maxmemory", "0") != "0" and policy.startswith("allkeys"):
        problem = f"maxmemory-policy is {policy}: a full server evicts whole streams, with unread messages"
        found.append(Finding(capability="guarantee", problem=problem, remedy="set maxmemory-policy noeviction"))
    connected = int(server.get("connected_slaves", "0")) if server.get("role") == "master" else 0
    if connected and not replicas:
        problem = "no replica must have a message before it is confirmed: a failover may lose confirmed messages"
        if (minimum := await _setting(execute, b"min-replicas-to-write")) not in ("0", None):
            lag = await _setting(execute, b"min-replicas-max-lag")
            problem = (
                f"min-replicas-to-write is {minimum}, but a replica that lags less than min-replicas-max-lag ({lag} s) "
                "counts: a failover may lose the messages confirmed in that time"
            )
        remedy = "make the broker with replicas=1 or more"
        found.append(Finding(capability="durability", problem=problem, remedy=remedy))
    if replicas > connected:
        waits = f"each send waits for {counted(replicas, 'replica')}"
        problem = f"{waits} and {counted(connected, 'is', 'are')} connected: every send is OutcomeUnknown"
        found.append(Finding(capability="receipt", problem=problem, remedy="add replicas, or wait for fewer"))
    return found


async def _info(execute: Execute, section: bytes) -> dict[str, str]:
    text: object = await execute(b"INFO", section)
    if not isinstance(text, bytes):  # a cluster client parses it, and has several servers
        raise ConfigurationError(
            "diator cannot ask the servers of this client what they keep; use durability='none' with a cluster, and "
            "check appendonly, appendfsync and maxmemory-policy of each server"
        )
    return {name: value for line in text.decode().splitlines() for name, colon, value in [line.partition(":")] if colon}


async def _setting(execute: Execute, name: bytes) -> str | None:
    """Return a setting; None if the user may not read it."""
    try:
        reply: Any = await execute(b"CONFIG", b"GET", name)
    except (AccessRefused, MessageRejected):  # managed services often forbid CONFIG
        return None
    pairs = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    value: bytes | None = pairs.get(name)
    return None if value is None else value.decode()
