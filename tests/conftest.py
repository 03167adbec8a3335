"""Addresses of services for the tests that ask for them, and what holds for every test."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.services import MissingService, Service, Services, required

#: Which service a fixture stands for.
FIXTURES = {
    "redis_url": "redis",
    "rabbitmq_url": "rabbitmq",
    "kafka_servers": "kafka",
    "postgres_url": "postgres",
}
Found = TypeVar("Found")

# Who writes scenarios is not spared by their being new.
os.environ["DIATOR_CONFORMANCE_STRICT"] = "1"
SERVICES = pytest.StashKey[Services]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin a run that has looked for nothing yet. The processes of pytest-xdist have one set of services."""
    try:
        required()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SERVICES] = Services(shared=getattr(config, "workerinput", {}).get("services"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have each process of pytest-xdist use the services of the run."""
    node.workerinput["services"] = node.config.stash[SERVICES].share()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out by the services that they need."""
    from tests.scheduling import ByService  # noqa: PLC0415  # pytest-xdist is there

    return ByService(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the processes of pytest-xdist begin with what takes long."""
    if hasattr(config, "workerinput"):
        from tests.scheduling import turn_of  # noqa: PLC0415

        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Bring up what the collected tests ask for: all at once, outside of any test's time limit."""
    if session.config.option.collectonly:
        return
    fixtures = {name for item in session.items for name in item.fixturenames}
    asked = {FIXTURES[name] for name in fixtures & FIXTURES.keys()}
    session.config.stash[SERVICES].look_for(asked | required())


@pytest.hookimpl(trylast=True)  # pytest-xdist ends its processes first, which could start containers until then
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A required service that is missing fails the run, even if no test asked for it."""
    services = session.config.stash[SERVICES]
    services.close()
    if session.exitstatus == pytest.ExitCode.OK and services.missing(required()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say in one line which services took part."""
    terminalreporter.write_line(config.stash[SERVICES].summary())


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    """A Redis that all tests share: keep to names of your own."""
    return found(pytestconfig.stash[SERVICES].url, "redis")


@pytest.fixture(scope="session")
def rabbitmq_url(pytestconfig: pytest.Config) -> str:
    """A RabbitMQ that all tests share: keep to names of your own."""
    return found(pytestconfig.stash[SERVICES].url, "rabbitmq")


@pytest.fixture(scope="session")
def kafka_servers(pytestconfig: pytest.Config) -> str:
    """A Kafka that all tests share: keep to names of your own."""
    return found(pytestconfig.stash[SERVICES].url, "kafka")


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """A PostgreSQL that all tests share: keep to names of your own."""
    return found(pytestconfig.stash[SERVICES].url, "postgres")


@pytest.fixture
def private_redis(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A Redis for this test alone, which may stop it, start it again, freeze it and kill it."""
    service = found(pytestconfig.stash[SERVICES].private, "redis")
    yield service
    service.remove()


@pytest.fixture
def private_rabbitmq(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A RabbitMQ for this test alone, which may set off its alarms."""
    service = found(pytestconfig.stash[SERVICES].private, "rabbitmq")
    yield service
    service.remove()


@pytest.fixture
def private_kafka(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A Kafka for this test alone. A proxy before its port `behind` has to listen at its port `proxied`."""
    service = found(pytestconfig.stash[SERVICES].private, "kafka")
    yield service
    service.remove()


def found(look: Callable[[str], Found], name: str) -> Found:
    """What *look* finds; else the test is skipped, or fails if the service is required."""
    try:
        return look(name)
    except MissingService as error:
        give_up = pytest.fail if name in required() else pytest.skip
        give_up(f"{name}: {error}; CONTRIBUTING.md says how to get it")


@pytest.fixture(autouse=True)
async def no_task_left_behind() -> AsyncIterator[None]:
    """What a test starts, it ends: no task outlives it (what is just ending may take a moment)."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=1)
    assert not left, f"left behind: {left}"
