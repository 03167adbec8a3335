"""The programs of docs/sqlalchemy.md with a database on disk: what is committed when, and what is rolled back."""

import asyncio
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("sqlalchemy.ext.asyncio")
pytest.importorskip("aiosqlite")
dishka = pytest.importorskip("dishka")
rodi = pytest.importorskip("rodi")

from sqlalchemy import event as on  # noqa: E402  # needs the package, as all below
from sqlalchemy import select  # noqa: E402
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine  # noqa: E402
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column  # noqa: E402

from diator.container import Container  # noqa: E402
from diator.container.dishka import DishkaContainer  # noqa: E402
from diator.container.rodi import RodiContainer  # noqa: E402
from diator.events import DomainEvent, EventMap, Events, NotificationEvent  # noqa: E402
from diator.exceptions import EventHandlersFailed  # noqa: E402
from diator.mediator import Mediator  # noqa: E402
from diator.requests import Request, RequestMap  # noqa: E402
from diator.testing import Recorder  # noqa: E402

pytestmark = pytest.mark.real_time  # aiosqlite has a thread


class Base(DeclarativeBase): ...


class Member(Base):
    __tablename__ = "members"
    user_id: Mapped[int] = mapped_column(primary_key=True)


@dataclass(frozen=True, kw_only=True)
class Join(Request[AsyncSession]):
    fails: str = ""


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    session: AsyncSession
    fails: str


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent): ...


requests, events = RequestMap(), EventMap()


@requests.handler
async def join(command: Join, session: AsyncSession, events: Events) -> AsyncSession:
    session.add(Member(user_id=1))
    await session.flush()
    events.extend([Joined(session=session, fails=command.fails), UserJoined()])
    if command.fails == "handler":
        raise ValueError
    if command.fails == "hangs":
        await asyncio.Event().wait()
    if command.fails == "commit":
        on.listen(session.sync_session, "before_commit", refuse)
    return session


@events.handler
async def joined(event: Joined, session: AsyncSession) -> None:
    assert session is event.session
    if event.fails == "event handler":
        raise ValueError


class CommitRefused(Exception): ...


def refuse(session: Session) -> None:
    raise CommitRefused


current_session: ContextVar[AsyncSession] = ContextVar("current_session")


def of_diator(sessions: async_sessionmaker[AsyncSession]) -> dict[str, Any]:
    async def session() -> AsyncGenerator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    container = Container()
    container.register(AsyncSession, session)
    return {"container": container}


def of_dishka(sessions: async_sessionmaker[AsyncSession]) -> dict[str, Any]:
    async def session() -> AsyncGenerator[AsyncSession, Exception | None]:
        async with sessions() as session:
            error = yield session
            if error is None:
                await session.commit()

    return {"container": provided_by(session)}


def provided_by(session: Any) -> DishkaContainer:
    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.provide(session)
    return DishkaContainer(dishka.make_async_container(provider))


def of_rodi(sessions: async_sessionmaker[AsyncSession]) -> dict[str, Any]:
    async def transaction(message, handle):
        async with sessions.begin() as session:
            token = current_session.set(session)
            try:
                return await handle(message)
            finally:
                current_session.reset(token)

    external, container = rodi.Container(), RodiContainer()
    external.add_scoped_by_factory(lambda: current_session.get(), AsyncSession)  # noqa: PLW0108  # rodi inspects it
    container.attach_external_container(external)
    return {"container": container, "middlewares": [transaction]}


def of_a_web_request(sessions: async_sessionmaker[AsyncSession]) -> dict[str, Any]:
    """The session is open already, and has begun its transaction by reading."""

    async def session() -> AsyncGenerator[AsyncSession]:
        session = current_session.get()
        try:
            yield session
        except BaseException:
            await session.rollback()
            raise
        await session.commit()

    async def request(message, handle):
        async with sessions() as session:
            await session.get(Member, 1)
            token = current_session.set(session)
            try:
                return await handle(message)
            finally:
                current_session.reset(token)

    container = Container()
    container.register(AsyncSession, session)
    return {"container": container, "middlewares": [request]}


@pytest.fixture
async def sessions(tmp_path):
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/members.db")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield async_sessionmaker(engine, expire_on_commit=False)
    await engine.dispose()


async def members(sessions) -> list[int]:
    """Read with a connection of its own, which sees only what is committed."""
    async with sessions() as session:
        return [*await session.scalars(select(Member.user_id))]


class LooksFirst(Recorder):
    """Sees what is committed when a message is sent."""

    def __init__(self, sessions) -> None:
        super().__init__()
        self._sessions = sessions
        self.committed: list[list[int]] = []

    async def send_message(self, message, /):
        self.committed.append(await members(self._sessions))
        await super().send_message(message)


WAYS = [of_diator, of_dishka, of_rodi, of_a_web_request]


@pytest.mark.parametrize("way", WAYS)
async def test_the_session_commits_before_the_events_are_sent(sessions, way):
    broker = LooksFirst(sessions)

    await Mediator(requests, event_map=events, message_broker=broker, **way(sessions)).send(Join())

    assert broker.names == ["UserJoined"]
    assert broker.committed == [[1]]


@pytest.mark.parametrize("way", WAYS)
async def test_each_send_has_a_session_of_its_own(sessions, way):
    mediator = Mediator(requests, event_map=events, message_broker=Recorder(), **way(sessions))

    first = await mediator.send(Join())
    async with sessions.begin() as session:
        await session.delete(await session.get_one(Member, 1))

    assert await mediator.send(Join()) is not first


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", ["handler", "event handler"])
async def test_an_error_rolls_back_and_sends_nothing(sessions, way, fails):
    broker = Recorder()

    with pytest.raises((ValueError, EventHandlersFailed)):
        await Mediator(requests, event_map=events, message_broker=broker, **way(sessions)).send(Join(fails=fails))

    assert (await members(sessions), broker.names) == ([], [])


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_send_rolls_back(sessions, way):
    broker = Recorder()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await Mediator(requests, event_map=events, message_broker=broker, **way(sessions)).send(Join(fails="hangs"))

    assert (await members(sessions), broker.names) == ([], [])


@pytest.mark.parametrize("way", WAYS)
async def test_a_commit_that_fails_is_an_error_of_the_send(sessions, way):
    broker = Recorder()
    error = dishka.exceptions.ExitError if way is of_dishka else CommitRefused

    with pytest.raises(error):
        await Mediator(requests, event_map=events, message_broker=broker, **way(sessions)).send(Join(fails="commit"))

    assert (await members(sessions), broker.names) == ([], [])


async def test_dishka_hides_the_error_from_a_generator_that_does_not_look_at_it(sessions):
    """The warning of the page. If this fails, dishka has changed, and the warning can go."""

    async def session() -> AsyncGenerator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    with pytest.raises(ValueError):  # noqa: PT011  # the error of the handler
        await Mediator(requests, provided_by(session), event_map=events, message_broker=Recorder()).send(
            Join(fails="handler")
        )

    assert await members(sessions) == [1]
