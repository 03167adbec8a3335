"""Some cells of the grid, with the real services; `python -m tests.grid` runs all of them."""

import pytest

from tests.conftest import SERVICES, found
from tests.grid.cells import SERVICES as BROKERS
from tests.grid.cells import run_cell

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def database(pytestconfig):
    """Start a PostgreSQL that a test may break."""
    service = found(pytestconfig.stash[SERVICES].private, "postgres")
    yield service
    service.remove()


@pytest.fixture
def broker(pytestconfig, service):
    started = found(pytestconfig.stash[SERVICES].private, BROKERS[service])
    yield started
    started.remove()


@pytest.mark.parametrize(("service", "fault"), [("streams", "sender"), ("rabbitmq", "failing"), ("kafka", "relay")])
async def test_nothing_is_lost_repeated_or_out_of_order(service, fault, broker, database):
    result = await run_cell(service, "outbox + inbox", fault, broker, database)

    assert result.is_kept, result
    assert result.is_clean, result
    assert result.committed >= 300


@pytest.mark.parametrize("service", ["streams"])
async def test_without_an_outbox_the_grid_sees_a_loss(service, broker, database):
    result = await run_cell(service, "send after commit", "sender", broker, database)

    assert result.lost > 0, result
    assert not result.is_clean
