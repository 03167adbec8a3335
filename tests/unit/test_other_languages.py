"""The page for other languages: its examples are tested programs, and its names and its schema are diator's."""

import importlib
import json
import re
from dataclasses import dataclass, make_dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from jsonschema import Draft202012Validator

from diator.brokers.base import Topic
from diator.brokers.codec import decode_envelope, encode, event_decoder, payload_decoder, payload_encoder
from diator.brokers.message import Message
from diator.events import NotificationEvent
from diator.exceptions import DecodingError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "for-other-languages.md").read_text(encoding="utf-8")
PEERS = ROOT / "tests" / "integration" / "peers"
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "envelope.schema.json").read_text(encoding="utf-8")))

BLOCKS = re.findall(r"^```(js|go)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_is_a_part_of_a_tested_program(language, block):
    wanted = lines_of(block)
    programs = [lines_of(path.read_text(encoding="utf-8")) for path in PEERS.glob(f"*/*.{language}")]

    assert any(wanted == program[start : start + len(wanted)] for program in programs for start in range(len(program)))


# -- the schema ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UserJoined(NotificationEvent):
    user_id: int = 7


ID = "9F62E977-8a1c-4b7e-a0d5-6c1f2f3b9e11"
BODY = {"message_type": "notification_event", "message_name": "UserJoined", "message_id": ID, "payload": {}}
PAYLOAD = {"event_id": ID, "event_timestamp": "2026-03-07T09:26:02.588855Z"}


def is_read(body):
    """Return whether diator reads *body*, and its payload as an event."""
    try:
        event_decoder(UserJoined)(decode_envelope(json.dumps(body).encode(), max_bytes=10_000, headers={}))
    except DecodingError:
        return False
    return True


@pytest.mark.parametrize("beside", [{}, {"key": "7"}, {"headers": {"tenant": "7"}}], ids=["plain", "key", "headers"])
@pytest.mark.parametrize("in_body", [True, False])
def test_what_diator_writes_fits_the_schema(beside, in_body):
    message = Message(
        message_type="notification_event",
        message_name="UserJoined",
        message_id=uuid4(),
        payload_json=payload_encoder(UserJoined)(UserJoined()),
        **beside,
    )

    SCHEMA.validate(json.loads(encode(message, headers_in_body=in_body)))


@pytest.mark.parametrize(
    "body",
    [
        BODY | {"payload": PAYLOAD},
        BODY | {"payload": PAYLOAD | {"further": [1]}, "further": None},
        *(BODY | {"message_id": value} for value in (ID.lower(), ID.replace("-", ""))),
        *(BODY | {"headers": value, "payload": PAYLOAD} for value in (None, {}, {"a": "7"}, {"a": 1}, {"key": None})),
        *(BODY | {"payload": PAYLOAD | {key: None}} for key in PAYLOAD),
        *(
            BODY | {"payload": PAYLOAD | {"event_timestamp": value}}
            for value in (
                "2026-03-07T09:26:02Z",
                "2026-03-07T09:26:02.123456789Z",
                "2026-03-07t09:26:02.5z",
                "2026-03-07 09:26:02+02:00",
                "2026-03-07T09:26:02-0730",
            )
        ),
    ],
    ids=json.dumps,
)
def test_what_fits_the_schema_is_read(body):
    SCHEMA.validate(body)

    assert is_read(body)


@pytest.mark.parametrize(
    "body",
    [
        *({key: value for key, value in BODY.items() if key != missing} for missing in BODY),
        *(BODY | {key: value} for key in BODY for value in (None, 5, True, [])),
        *(BODY | {"message_id": value} for value in (f"{{{ID}}}", f"urn:uuid:{ID}", ID[:-1], ID.replace("9", "g"), "")),
        BODY | {"message_id": "9f62e9778a1c-4b7e-a0d5-6c1f2f3b9e11"},
        *(BODY | {"headers": value} for value in ([], "", 5)),
        *(BODY | {"payload": PAYLOAD | {"event_id": value}} for value in ("7", 7)),
        *(
            BODY | {"payload": PAYLOAD | {"event_timestamp": value}}
            for value in (1767323045, "", "2026-03-07", "2026-03-07T09:26Z", "2026-03-07T09:26:02Z[Europe/Paris]")
        ),
        [BODY],
        None,
    ],
    ids=json.dumps,
)
def test_what_does_not_fit_the_schema_is_not_read(body):
    assert not SCHEMA.is_valid(body)
    assert not is_read(body)


def test_the_page_shows_a_body_that_fits_the_schema():
    (body,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

    SCHEMA.validate(json.loads(body))
    assert is_read(json.loads(body))


# -- the values ----------------------------------------------------------------------------------------------------

UUID_, AT = UUID(ID), datetime(2026, 3, 7, 9, 26, 2, 588_855, tzinfo=UTC)


def reader_of(annotation):
    read = payload_decoder(make_dataclass("Event", [("value", annotation)], kw_only=True))
    return lambda value: read(b'{"value": %b}' % value.encode()).value


@pytest.mark.parametrize(
    ("annotation", "value", "written", "also_read", "not_read"),
    [
        (UUID, UUID_, f'"{ID.lower()}"', [f'"{ID}"', f'"{UUID_.hex}"'], [f'"{{{ID}}}"', f'"urn:uuid:{ID}"']),
        (
            datetime,
            AT,
            '"2026-03-07T09:26:02.588855Z"',
            ['"2026-03-07T11:26:02.588855+02:00"', '"2026-03-07T11:26:02.5888547+0200"'],
            ["1767323045", '"2026-03-07T09:26:02.588855Z[Europe/Paris]"'],
        ),
        (date, AT.date(), '"2026-03-07"', [], ['"2026-03-07T00:00:00Z"']),
        (timedelta, timedelta(days=1, seconds=90.5), '"P1DT90.5S"', ['"P1DT1M30.5S"'], ['"P1M"', "90"]),
        (int, 2**53 + 1, "9007199254740993", [], ["1.0", '"1"']),
        (float, 0.1, "0.1", ["1e-1"], ["NaN"]),
        (Decimal, Decimal("12.30"), '"12.30"', ["12.3"], []),
        (bytes, b"\x00\xff", '"AP8="', [], ['"AP8"', '"AP-_"']),
        (str, "ü", '"ü"', [r'"\u00fc"'], [r'"\ud800"']),
        (None, None, "null", [], []),
    ],
    ids=str,
)
def test_the_values_are_those_of_the_page(annotation, value, written, also_read, not_read):
    event = make_dataclass("Event", [("value", annotation)], kw_only=True)
    read = reader_of(annotation)

    assert f"| `{getattr(annotation, '__name__', 'None')}` | `{written}`" in PAGE
    assert payload_encoder(event)(event(value=value)).decode() == f'{{"value":{written}}}'
    assert [read(each) for each in (written, *also_read)] == [value] * (1 + len(also_read))
    for each in not_read:
        with pytest.raises(DecodingError):
            read(each)


# -- the names -----------------------------------------------------------------------------------------------------

PLAIN, ODD = Topic("notification_event", "UserJoined"), Topic("notification_event", "Zoë:joined #1")


def redis_names(names):
    for topic, what in ((PLAIN, ""), (ODD, "| Redis Streams, dead letters | ")):
        stream = names.stream("shop", topic)
        yield f"{what}`{names.of_group(stream, 'billing', names.DEAD).decode()}`"
    yield f"stream `{names.stream('shop', PLAIN).decode()}`"
    yield f"channel `{names.channel('shop', PLAIN).decode()}`"
    yield f"| Redis Pub/Sub, channel | `{names.channel('shop', ODD).decode()}` |"


def rabbitmq_names(names):
    queue = names.queue_name("shop", PLAIN, "billing")
    yield f"topic exchange `shop`, routing key `{names.routing_key(*PLAIN)}`"
    yield f"the alternate exchange `{names.retained_exchange_name('shop')}`"
    yield from (f"the queue `{queue}`", f"queue `{queue}:dead`")
    yield f"| RabbitMQ, routing key | `{names.routing_key(*ODD)}` |"
    yield f"| RabbitMQ, queue | `{names.queue_name('shop', ODD, 'billing')}` |"


def kafka_names(names):
    ours = names.Names("shop")
    yield f"topic `{ours.topic(PLAIN)}`"
    yield f"topic `{ours.beside(ours.topic(PLAIN), 'billing', names.DEAD)}`"
    yield f"| Kafka, topic | `{ours.topic(ODD)}` |"


@pytest.mark.parametrize(
    ("client", "service", "names_of"),
    [
        ("redis", "redis", redis_names),
        ("aiormq", "rabbitmq", rabbitmq_names),
        ("aiokafka", "kafka", kafka_names),
    ],
    ids=["redis", "rabbitmq", "kafka"],
)
def test_the_page_has_the_names(client, service, names_of):
    pytest.importorskip(client)
    names = importlib.import_module(f"diator.brokers.{service}._names")

    for name in names_of(names):
        assert name in PAGE


# -- the programs --------------------------------------------------------------------------------------------------


def test_the_lock_file_of_the_program_in_node_names_no_host():
    """So that any registry serves it."""
    assert "://" not in (PEERS / "node" / "package-lock.json").read_text(encoding="utf-8")
