"""The page for other languages: its examples are tested programs, and its names and its schema are diator's."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from jsonschema import Draft202012Validator

from diator.brokers.base import Topic
from diator.brokers.codec import decode, encode, payload_decoder, payload_encoder
from diator.brokers.kafka._names import DEAD, Names
from diator.brokers.message import Message
from diator.brokers.rabbitmq._names import queue_name, routing_key
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
        payload_decoder(UserJoined)(decode(json.dumps(body).encode()).payload_json)
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
        *(BODY | {"headers": value, "payload": PAYLOAD} for value in ({}, {"tenant": "7"})),
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
        *(BODY | {"headers": value} for value in ([], "", 5, {"a": 1}, {"a": None}, {"key": None})),
        *(BODY | {"payload": PAYLOAD | {"event_id": value}} for value in ("7", 7, None)),
        *(
            BODY | {"payload": PAYLOAD | {"event_timestamp": value}}
            for value in (None, 1767323045, "", "2026-03-07", "2026-03-07T09:26Z", "2026-03-07T09:26:02Z[Europe/Paris]")
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


# -- the names -----------------------------------------------------------------------------------------------------

PLAIN, ODD = Topic("notification_event", "UserJoined"), Topic("notification_event", "Zoë:joined #1")
KAFKA = Names("shop")


@pytest.mark.parametrize(
    "name",
    [
        f"topic exchange `shop`, routing key `{routing_key(*PLAIN)}`",
        f"queue `{queue_name('shop', PLAIN, 'billing')}:dead`",
        f"the queue `{queue_name('shop', PLAIN, 'billing')}`",
        f"topic `{KAFKA.topic(PLAIN)}`",
        f"topic `{KAFKA.beside(KAFKA.topic(PLAIN), 'billing', DEAD)}`",
        f"| RabbitMQ, routing key | `{routing_key(*ODD)}` |",
        f"| RabbitMQ, queue | `{queue_name('shop', ODD, 'billing')}` |",
        f"| Kafka, topic | `{KAFKA.topic(ODD)}` |",
    ],
)
def test_the_page_has_the_names(name):
    assert name in PAGE


# -- the programs --------------------------------------------------------------------------------------------------


def test_the_lock_file_of_the_program_in_node_names_no_host():
    """So that any registry serves it."""
    assert "://" not in (PEERS / "node" / "package-lock.json").read_text(encoding="utf-8")
