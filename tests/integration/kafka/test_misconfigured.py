"""Wrong addresses, logins and settings: each error states what is wrong, where, and what to do."""

import asyncio
import ssl
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor

from diator.brokers.audit import audit
from diator.brokers.kafka import KafkaMessageBroker
from diator.exceptions import AccessRefused, BrokerUnavailable, ConfigurationError
from diator.testing._suite.runner import open_files
from diator.testing.servers import Certificates
from tests.conftest import SERVICES, found
from tests.integration.harnesses.kafka import guarded_kafka
from tests.integration.kafka.helpers import SLACK, TIMEOUT, acked, message, send, subscribed, within

PASSWORD = "swordfish-of-the-kafka-tests"
LOGIN = {"sasl_mechanism": "PLAIN", "username": "granted", "password": PASSWORD}


@pytest.fixture(scope="module")
def guarded(pytestconfig):
    """The address of a Kafka with TLS and users, and a context that trusts it."""
    certificates = Certificates()
    backend = guarded_kafka(certificates, "server", PASSWORD)
    service = found(lambda _: pytestconfig.stash[SERVICES].private(backend), "kafka")
    yield service.url, ssl.create_default_context(cafile=certificates.path / "ca.pem")
    service.remove()
    certificates.close()


async def errors_of(servers, prefix, **options) -> list[Exception]:
    """Return what each way to use the broker raises."""
    files = open_files()
    broker = KafkaMessageBroker(servers, prefix, timeout=TIMEOUT, **options)

    async def subscribe():
        async with subscribed(broker):
            pass

    calls = [broker._service.open(), broker.send_message(message(0)), subscribe(), audit(broker)]
    async with within(SLACK):
        errors = [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]
    await broker.aclose()
    # aiokafka hands out no connection that was refused: nobody waits until its TLS is shut down; the loop ends here.
    async with within(SLACK):
        while not open_files() <= files:  # noqa: ASYNC110  # nothing notifies
            await asyncio.sleep(0.01)
    assert PASSWORD not in "".join(map(repr, errors))
    return errors


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"password": "wrong"}, "Invalid username or password"),
        ({"username": "nobody"}, "Invalid username or password"),
        ({"sasl_mechanism": "SCRAM-SHA-512"}, "UnsupportedSaslMechanism"),
    ],
)
async def test_a_refused_login_is_an_error_at_once(guarded, prefix, different, reason) -> None:
    address, context = guarded

    errors = await errors_of(address, prefix, ssl_context=context, **LOGIN | different)

    assert [type(error) for error in errors] == [AccessRefused] * 4
    for error in errors:
        assert f"Kafka refuses the login at {address}" in str(error)
        assert reason in str(error)
        assert "check sasl_mechanism, username and password" in str(error)
    assert errors[1].message_id is not None


async def test_a_login_that_kafka_does_not_take_is_an_error_at_once(kafka_servers, prefix) -> None:
    errors = await errors_of(kafka_servers, prefix, **LOGIN)

    assert [type(error) for error in errors] == [AccessRefused] * 4
    assert all(f"Kafka takes no login at {kafka_servers}" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("no TLS", "may expect TLS (ssl_context) or a login"),
        ("no login", "may expect TLS (ssl_context) or a login"),
        ("another authority", "certificate verify failed"),
    ],
)
async def test_a_connection_that_kafka_closes_says_why_it_may(guarded, prefix, options, reason) -> None:
    address, context = guarded
    settings = {
        "no TLS": LOGIN,
        "no login": {"ssl_context": context},
        "another authority": LOGIN | {"ssl_context": ssl.create_default_context()},
    }

    errors = await errors_of(address, prefix, **settings[options])

    assert [type(error) for error in errors] == [BrokerUnavailable] * 4
    assert all(f"{address}: " in str(error) and reason in str(error) for error in errors)


async def test_every_address_that_cannot_be_used_is_named_with_its_reason(prefix) -> None:
    async def close(_, writer) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def silence(reader, writer) -> None:
        await reader.read()
        writer.close()

    async with listening(close) as closing, listening(silence) as silent:
        errors = await errors_of(f"{closing},{silent},127.0.0.1:1,no-such-host.invalid:9092", prefix)

    assert [type(error) for error in errors] == [BrokerUnavailable] * 4
    for error in errors:
        assert f"{closing}: the other end closed the connection" in str(error)
        assert f"{silent}: no answer within 0.675 s" in str(error)
        assert "127.0.0.1:1: ConnectionRefusedError" in str(error)
        assert "no-such-host.invalid:9092: gaierror" in str(error)


@asynccontextmanager
async def listening(serve):
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("first", ["127.0.0.1:1", "silent"])
async def test_an_address_that_cannot_be_used_leaves_time_for_the_others(make, kafka_servers, first) -> None:
    async def silence(reader, writer) -> None:
        await reader.read()
        writer.close()

    async with listening(silence) as silent:
        broker = await make(f"{silent if first == 'silent' else first},{kafka_servers}")
        for _ in range(3):  # aiokafka shuffles the addresses
            async with subscribed(broker, group=None) as deliveries:
                await send(broker, 7)
                assert await acked(deliveries, 1) == [7]


async def test_a_group_of_another_program_is_a_configuration_error(broker, kafka_servers, name, prefix) -> None:
    await send(broker, 0)
    theirs = AIOKafkaConsumer(
        name,
        bootstrap_servers=kafka_servers,
        group_id=f"{prefix}.billing",
        partition_assignment_strategy=[RangePartitionAssignor],
        enable_auto_commit=False,
    )
    async with theirs, within(SLACK):
        with pytest.raises(ConfigurationError) as refused:
            await subscribed(broker).__aenter__()

    assert f"the group {prefix}.billing" in str(refused.value)
    assert "InconsistentGroupProtocolError" in str(refused.value)
    assert "use another group" in str(refused.value)
    async with subscribed(broker) as deliveries:
        assert await acked(deliveries, 1) == [0]


@pytest.mark.parametrize("session_timeout", [1.0, 3_600.0])
async def test_a_session_that_kafka_does_not_allow_is_a_configuration_error(make, kafka_servers, session_timeout):
    broker = await make(kafka_servers, session_timeout=session_timeout)

    with pytest.raises(ConfigurationError, match=r"InvalidSessionTimeoutError.*group.min.session.timeout.ms"):
        await subscribed(broker).__aenter__()
