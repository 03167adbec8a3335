"""Fixtures for the services, and checks of every test."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests import peers
from tests.services import MissingService, Service, Services, required

#: The service of each fixture.
FIXTURES = {
    "redis_url": "redis",
    "rabbitmq_url": "rabbitmq",
    "kafka_servers": "kafka",
    "postgres_url": "postgres",
}
#: The address in the repr of an object: the processes of pytest-xdist must all see the same names.
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}")
Found = TypeVar("Found")

# In this repository new scenarios count.
os.environ["DIATOR_CONFORMANCE_STRICT"] = "1"
SERVICES = pytest.StashKey[Services]()


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the services of the run, which the processes of pytest-xdist share."""
    try:
        required()
        peers.required()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[SERVICES] = Services(shared=getattr(config, "workerinput", {}).get("services"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the services of the run to a process of pytest-xdist."""
    node.workerinput["services"] = node.config.stash[SERVICES].share()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the tests by the services that they need."""
    from tests.scheduling import ByService  # noqa: PLC0415  # pytest-xdist is there

    return ByService(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse names that differ from run to run; let the processes of pytest-xdist start with the long tests."""
    if unstable := [item.nodeid for item in items if ADDRESS.search(item.nodeid)]:
        raise pytest.UsageError(f"an address in memory in the name of a test: give its parameters ids: {unstable}")
    if hasattr(config, "workerinput"):
        from tests.scheduling import turn_of  # noqa: PLC0415

        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start all services that the collected tests need, outside of any test's time limit."""
    if session.config.option.collectonly:
        return
    fixtures = {name for item in session.items for name in item.fixturenames}
    asked = {FIXTURES[name] for name in fixtures & FIXTURES.keys()}
    session.config.stash[SERVICES].look_for(asked | required())


@pytest.hookimpl(trylast=True)  # after pytest-xdist has ended its processes, which may start containers
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a required service is missing, even if no test needs it."""
    services = session.config.stash[SERVICES]
    services.close()
    if session.exitstatus == pytest.ExitCode.OK and services.missing(required()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print one line about the services."""
    terminalreporter.write_line(config.stash[SERVICES].summary())


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    """The address of a Redis that all tests share: use your own names."""
    return found(pytestconfig.stash[SERVICES].url, "redis")


@pytest.fixture(scope="session")
def rabbitmq_url(pytestconfig: pytest.Config) -> str:
    """The address of a RabbitMQ that all tests share: use your own names."""
    return found(pytestconfig.stash[SERVICES].url, "rabbitmq")


@pytest.fixture(scope="session")
def kafka_servers(pytestconfig: pytest.Config) -> str:
    """The address of a Kafka that all tests share: use your own names."""
    return found(pytestconfig.stash[SERVICES].url, "kafka")


@pytest.fixture(scope="session")
def postgres_url(pytestconfig: pytest.Config) -> str:
    """The address of a PostgreSQL that all tests share: use your own names."""
    return found(pytestconfig.stash[SERVICES].url, "postgres")


@pytest.fixture
def private_redis(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A Redis for one test, which may configure, stop, restart, freeze and kill it."""
    service = found(pytestconfig.stash[SERVICES].private, "redis")
    yield service
    service.remove()


@pytest.fixture
def private_rabbitmq(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A RabbitMQ for one test, which may trigger its alarms."""
    service = found(pytestconfig.stash[SERVICES].private, "rabbitmq")
    yield service
    service.remove()


@pytest.fixture
def private_kafka(pytestconfig: pytest.Config) -> Iterator[Service]:
    """A Kafka for one test. A proxy in front of its port `behind` has to listen at its port `proxied`."""
    service = found(pytestconfig.stash[SERVICES].private, "kafka")
    yield service
    service.remove()


def found(look: Callable[[str], Found], name: str) -> Found:
    """Return the result of *look*; skip the test if the service is missing, or fail it if the service is required."""
    try:
        return look(name)
    except MissingService as error:
        give_up = pytest.fail if name in required() else pytest.skip
        give_up(f"{name}: {error}; CONTRIBUTING.md says how to get it")


@pytest.fixture(autouse=True)
async def no_task_left_behind() -> AsyncIterator[None]:
    """Fail a test that leaves a task running. A task that is just ending may take a moment."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=1)
    assert not left, f"left behind: {left}"
