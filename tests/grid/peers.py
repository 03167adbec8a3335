"""Other libraries that the grid counts, each with its defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.environments import OUTBOX_LIBRARIES, Library, as_here
from tests.grid.cells import Way


@dataclass(frozen=True, kw_only=True)
class Peer:
    """
    Another library.

    Attributes:
        environment: Where it is installed.
        module: Its programs.
        way: How it sends.
        settings: What is set in it, for the page.
    """

    environment: Library
    module: str
    way: Way
    settings: str

    @property
    def program(self) -> Sequence[str]:
        return self.environment.python, "-m", self.module

    @property
    def installed(self) -> str:
        return ", ".join(f"`{pin}`" for pin in self.environment.pins)


#: By name and version.
PEERS = {
    "FastStream 0.7.8": Peer(
        environment=Library(
            name="FastStream",
            adapter="grid_with_faststream",
            pins=("faststream[rabbit]==0.7.8", *as_here("sqlalchemy", "greenlet", "asyncpg", "aio-pika", "aiormq")),
        ),
        module="tests.grid.with_faststream",
        way="send after commit",
        settings="With its defaults: `RabbitBroker(url)` (without its log), `broker.publish(event, queue=…)` after the "
        "commit, and `broker.subscriber(queue)`, which has no limit of prefetch and acknowledges after the handler. "
        "Its queues and messages are not durable. A lost connection is tried again after 5 seconds, and a publish "
        "fails until then.",
    ),
    "python-cqrs 5.3.0": Peer(
        environment=OUTBOX_LIBRARIES["python-cqrs"],
        module="tests.grid.with_python_cqrs",
        way="outbox",
        settings="With its defaults: `SqlAlchemyOutboxedEventRepository`, `EventProducer` in the loop of its readme "
        "(100 events, a commit, 10 seconds of pause, in which a short fault may pass by), `AMQPMessageBroker`, and "
        "`amqp_consumer_factory`, with an acknowledgement after the handler. Its queues and messages are not durable. "
        "Its inbox, which the readme does not show, is not used.",
    ),
}

#: What can happen to them.
FAULTS = ("sender", "relay", "consumer", "service", "reset", "transaction", "failing")
