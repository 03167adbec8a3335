"""The cells of the grid: a service, a way to send, and a fault; and what became of the work."""

import asyncio
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from diator.outbox.sqlalchemy import SqlAlchemyStore
from diator.testing.fault_proxy import FaultProxy, Flow
from tests.grid.ledger import Settings, effects, metadata, work
from tests.services import Service

Way: TypeAlias = Literal["outbox + inbox", "outbox", "send after commit"]
WAYS: tuple[Way, ...] = ("outbox + inbox", "outbox", "send after commit")
SERVICES = {"streams": "redis", "rabbitmq": "rabbitmq", "kafka": "kafka"}

#: The programs of the grid. Other libraries have their own: `tests.grid.peers`.
OWN = (sys.executable, "-m", "tests.grid.program")

#: How long a cell waits until everything has its effect, in seconds.
WITHIN = 120.0
#: For how long nothing may have happened until a cell without an outbox gives up, in seconds: longer than a service
#: keeps the messages of a dead consumer. Kafka waits for its session, and then for the other consumers.
QUIET = {"streams": 15.0, "rabbitmq": 15.0, "kafka": 75.0}


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    What became of the work of a cell.

    Attributes:
        committed: How many pieces of work are in the database.
        confirmed: How many of them the sender knows of.
        effects: How many of them had an effect.
        lost: How many had none.
        repeated: How many further effects there were.
        refused: How many duplicates the inbox refused.
        inversions: How often a piece of work had its effect before an earlier one of its key.
        recovered: In how many seconds after the fault was over, and the sender had ended, everything had its effect.
            None: it never had.
        phantoms: How many effects are of work that is not in the database.
        library: Whose promise it is; that of another library is not judged.
    """

    service: str
    way: Way
    fault: str
    committed: int
    confirmed: int
    effects: int
    lost: int
    repeated: int
    refused: int
    inversions: int
    phantoms: int
    recovered: float | None
    library: str = "diator"

    @property
    def is_kept(self) -> bool:
        """Whether the promise of this way was kept. Nothing is promised without an outbox."""
        if self.library != "diator" or self.way == "send after commit":
            return True
        once = self.repeated == 0 or self.way == "outbox"
        in_order = self.inversions == 0 or FAULTS[self.fault].redelivers
        return self.committed > 0 and self.lost == self.phantoms == 0 and once and in_order

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated or out of order."""
        return self.lost == self.repeated == self.inversions == 0


class Child:
    """A process of the grid, and what it has said. It is started again when it dies, as a supervisor would."""

    def __init__(self, program: Sequence[str], said: list[dict[str, Any]], role: str, settings: Settings) -> None:
        self.program = program
        self.role = role
        self.settings = settings
        self._said = said
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._is_ending = False

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(*self.program, self.role, self.settings.to_json()),
            stdout=asyncio.subprocess.PIPE,
            stderr=None if os.environ.get("DIATOR_GRID_LOG") else asyncio.subprocess.DEVNULL,
        )
        self._reading = asyncio.create_task(self._read(self._process))

    async def ready(self) -> None:
        async with asyncio.timeout(WITHIN):
            await self._ready.wait()

    async def ended(self) -> None:
        """Wait until a sender has done its work, also if it died on the way."""
        while self._reading is not None and not self._reading.done():
            await asyncio.wait([self._reading])

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            said = json.loads(line)
            self._said.append({"role": self.role, "at": monotonic(), **said})
            if said["what"] == "ready":
                self._ready.set()
        await process.wait()
        if process.returncode and not self._is_ending:
            self.settings = replace(
                self.settings, dies_at=None, first=self.settings.first + self.settings.count, lasts=0.0
            )
            await asyncio.sleep(0.5)
            await self.start()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    async def end(self) -> None:
        self._is_ending = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@dataclass(frozen=True, kw_only=True)
class World:
    """
    The services of a cell. A fault changes them while the sender works.

    Attributes:
        broker, database: The containers of the message broker and of PostgreSQL.
        proxy: Before the broker, on the way of the process that sends.
        administer: Runs a statement in the database.
    """

    broker: Service
    database: Service
    proxy: FaultProxy
    administer: Callable[[str], Awaitable[None]]


async def nothing(_: World) -> None: ...


async def kill_service(world: World) -> None:
    await asyncio.to_thread(world.broker.kill)
    await asyncio.sleep(2)
    await asyncio.to_thread(world.broker.start)


async def kill_database(world: World) -> None:
    await asyncio.to_thread(world.database.kill)
    await asyncio.sleep(2)
    await asyncio.to_thread(world.database.start)


async def read_only(world: World) -> None:
    """As after a failover: the connections are lost, and the new ones cannot write."""
    await world.administer("ALTER SYSTEM SET default_transaction_read_only = on")
    await world.administer("SELECT pg_reload_conf()")
    await world.administer(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' "
        "AND pid <> pg_backend_pid()"
    )
    await asyncio.sleep(3)
    await world.administer("ALTER SYSTEM RESET default_transaction_read_only")  # it is allowed there
    await world.administer("SELECT pg_reload_conf()")


async def reset_link(world: World) -> None:
    for _ in range(6):
        world.proxy.reset()
        await asyncio.sleep(0.5)


async def stall_link(world: World) -> None:
    world.proxy.withhold(Flow.TO_CLIENT)
    await asyncio.sleep(8)
    await world.proxy.heal()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """
    What goes wrong in a cell.

    Attributes:
        title: What it is, for the table.
        strikes: Changes the services, when a quarter of the work is done. It ends when the fault is over.
        sender, relay, consumer: What differs in the settings of these processes.
        relays: How many relays there are.
        needs_relay: Whether it cannot happen without a relay.
        redelivers: Whether the consumer gets messages again. They may then come behind later ones with their key.
    """

    title: str
    strikes: Callable[[World], Awaitable[None]] = nothing
    sender: dict[str, Any] = field(default_factory=dict)
    relay: dict[str, Any] = field(default_factory=dict)
    consumer: dict[str, Any] = field(default_factory=dict)
    relays: int = 1
    needs_relay: bool = False
    redelivers: bool = False


FAULTS = {
    "sender": Fault(title="the sender is killed after a commit", sender={"dies_at": 80}),
    "relay": Fault(title="the relay is killed between a send and its finish", relay={"dies_at": 40}, needs_relay=True),
    "consumer": Fault(
        title="the consumer is killed after its commit, before the ack", consumer={"dies_at": 60}, redelivers=True
    ),
    "service": Fault(title="the message broker is killed", strikes=kill_service, redelivers=True),
    "database": Fault(title="the database is killed", strikes=kill_database, redelivers=True),
    "read-only": Fault(title="the database is read-only, as after a failover", strikes=read_only, redelivers=True),
    "reset": Fault(title="the link to the broker is reset", strikes=reset_link),
    "stall": Fault(title="the link to the broker stalls", strikes=stall_link),
    "clock": Fault(title="the clock of the relay is five minutes ahead", relay={"ahead": 300.0}, needs_relay=True),
    "relays": Fault(title="there are two relays", relays=2, needs_relay=True),
    "transaction": Fault(title="a transaction stays open, with earlier messages", sender={"lasts": 4.0}),
    "failing": Fault(
        title="15 % of the sends fail, half of them after the message has arrived",
        sender={"fails": 0.15},
        relay={"fails": 0.15},
    ),
}


async def run_cell(
    service: str,
    way: Way,
    fault_name: str,
    broker: Service,
    database: Service,
    *,
    library: str = "diator",
    program: Sequence[str] = OWN,
) -> Result:
    """Run one cell: its processes, and the fault that strikes while the sender works."""
    fault, name = FAULTS[fault_name], f"grid_{uuid4().hex[:10]}"
    said: list[dict[str, Any]] = []
    async with _proxied(broker, service) as (proxy, proxied), _database(database, name) as (url, ask):
        base = Settings(
            service=service,
            address=broker.url,
            database=url,
            name=name,
            has_outbox=way != "send after commit",
            has_inbox=way == "outbox + inbox",
        )
        child = partial(Child, program, said)
        # With an outbox, the relay sends, and its sends fail.
        sender = {} if base.has_outbox and "fails" in fault.sender else fault.sender
        consumers = [child("consume", replace(base, **fault.consumer))]
        sending = child("send", replace(base, **sender, **({} if base.has_outbox else {"address": proxied})))
        relays = [
            child("relay", replace(base, address=proxied, **fault.relay))
            for _ in range(fault.relays if base.has_outbox else 0)
        ]
        children = [*consumers, sending, *relays]
        try:
            await asyncio.gather(*(each.start() for each in consumers))
            await asyncio.gather(*(each.ready() for each in consumers))
            await asyncio.gather(*(each.start() for each in (sending, *relays)))
            await _until(lambda: sum(each["what"] == "confirmed" for each in said) >= base.keys * base.count / 4)
            world = World(broker=broker, database=database, proxy=proxy, administer=_administering(database.url))
            await fault.strikes(world)
            await sending.ended()
            is_over = monotonic()
            recovered = await _drain(ask, is_over, None if base.has_outbox else QUIET[service])
        finally:
            await asyncio.gather(*(each.end() for each in children))
        done = await ask(f"SELECT key, number FROM {work.name}")
        seen = await ask(f"SELECT key, number FROM {effects.name} ORDER BY place")
    counts = judged(said, done, seen, recovered)
    return Result(service=service, way=way, fault=fault_name, **counts, library=library)


def judged(
    said: Sequence[dict[str, Any]],
    done: Sequence[tuple[str, int]],
    seen: Sequence[tuple[str, int]],
    recovered: float | None,
) -> dict[str, Any]:
    """Return what became of the work that is *done*, by its key and number, from the effects that were *seen*."""
    committed, counted = {*done}, Counter(seen)
    first_effects = [*dict.fromkeys(each for each in seen if each in committed)]
    latest: dict[str, int] = defaultdict(lambda: -1)
    inversions = 0
    for key, number in first_effects:
        inversions += number < latest[key]
        latest[key] = max(latest[key], number)
    confirmed = {(each["key"], each["number"]) for each in said if each["what"] == "confirmed"}
    lost = len(committed - counted.keys())
    return {
        "committed": len(committed),
        "confirmed": len(confirmed),
        "effects": len(committed & counted.keys()),
        "lost": lost + len(confirmed - committed),
        "repeated": sum(counted.values()) - len(counted),
        "refused": sum(each["what"] == "handled" and each["outcome"] == "duplicate" for each in said),
        "inversions": inversions,
        "phantoms": len(counted.keys() - committed),
        "recovered": None if lost or recovered is None else round(recovered, 1),
    }


async def _drain(ask: Any, is_over: float, quiet: float | None) -> float | None:
    """
    Wait until all work had its effect. Return how long that took after the fault; None if it never had.

    Give up when nothing has happened for *quiet* seconds.
    """
    began = changed = monotonic()
    last = -1
    while True:
        now = monotonic()
        [(left, count)] = await ask(
            f"SELECT (SELECT count(*) FROM {work.name} w WHERE NOT EXISTS (SELECT 1 FROM {effects.name} e "
            f"WHERE (e.key, e.number) = (w.key, w.number))), (SELECT count(*) FROM {effects.name})"
        )
        if count != last:
            last, changed = count, now
        if not left and now - changed > 3.0:  # a duplicate may still be on its way
            return max(changed - is_over, 0.0)
        if now - began > WITHIN or (quiet is not None and now - changed > quiet):
            return None
        await asyncio.sleep(0.25)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN):
        while not holds():  # noqa: ASYNC110  # lines of other processes
            await asyncio.sleep(0.02)


@asynccontextmanager
async def _proxied(broker: Service, service: str) -> AsyncGenerator[tuple[FaultProxy, str]]:
    """Put a proxy before the broker. Kafka redirects its clients to the port at which the proxy has to listen."""
    parts = urlsplit(broker.url if "//" in broker.url else f"//{broker.url}")
    proxy = FaultProxy("127.0.0.1", broker.behind if service == "kafka" else parts.port or 0)
    if service == "kafka":
        proxy.port = broker.proxied
    async with proxy:
        netloc = parts.netloc.replace(f":{parts.port}", f":{proxy.port}")
        yield proxy, urlunsplit(parts._replace(netloc=netloc)).removeprefix("//")


@asynccontextmanager
async def _database(database: Service, name: str) -> AsyncGenerator[tuple[str, Any]]:
    """Make a database for one cell. Yield its address for SQLAlchemy, and a function that asks it something."""
    await _administering(database.url)(f'CREATE DATABASE "{name}"')
    own = database.url.rsplit("/", 1)[0] + f"/{name}"
    url = own.replace("postgresql://", "postgresql+asyncpg://")
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await SqlAlchemyStore(engine).create_tables()
    await engine.dispose()

    async def ask(statement: str) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(own)
        try:
            return [tuple(each) for each in await connection.fetch(statement)]
        finally:
            await connection.close()

    yield url, ask


def _administering(url: str) -> Callable[[str], Awaitable[None]]:
    async def administer(statement: str) -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    return administer
