"""Which rule of the contract each scenario proves. The rules are quoted from the docstrings that specify them."""

from __future__ import annotations

from typing import Any

from diator.brokers import codec, sending, supervisor
from diator.brokers.base import Delivery, ReadableBroker, Settler, Topic, Transport
from diator.brokers.capabilities import Capabilities
from diator.consumer import Consumer, Health
from diator.testing._suite.rules import Contract

_GUIDE = "docs/writing-a-transport.md"
_PLACES: dict[str, tuple[Any, str]] = {
    "Capabilities": (Capabilities, f"{_GUIDE}#what-to-promise"),
    "capabilities": (vars(ReadableBroker)["capabilities"].fget, f"{_GUIDE}#what-to-promise"),
    "transactional": (sending.transactional, f"{_GUIDE}#what-to-promise"),
    "MessageBroker": (sending.MessageBroker, f"{_GUIDE}#sending"),
    "send_message": (sending.MessageBroker.send_message, f"{_GUIDE}#sending"),
    "send_messages": (sending.BatchMessageBroker.send_messages, f"{_GUIDE}#sending"),
    "codec": (codec, f"{_GUIDE}#sending"),
    "Topic": (Topic, f"{_GUIDE}#sending"),
    "subscribe": (ReadableBroker.subscribe, f"{_GUIDE}#receiving"),
    "Delivery": (Delivery, f"{_GUIDE}#receiving"),
    "receive_nowait": (supervisor.ResilientSubscription.receive_nowait, f"{_GUIDE}#receiving"),
    "make_room": (supervisor.ResilientSubscription.make_room, f"{_GUIDE}#receiving"),
    "Settler": (Settler, f"{_GUIDE}#settling"),
    "ack": (Delivery.ack, f"{_GUIDE}#settling"),
    "retry": (Delivery.retry, f"{_GUIDE}#settling"),
    "dead_letter": (Delivery.dead_letter, f"{_GUIDE}#settling"),
    "Transport": (Transport, f"{_GUIDE}#ending"),
    "aclose": (Transport.aclose, f"{_GUIDE}#ending"),
    "Consumer": (Consumer, "docs/consuming.md"),
    "Health": (Health, "docs/consuming.md#logs-metrics-and-health"),
}
"""Where the contract stands: the object with the docstring, and the section of the guide that explains it."""

RULES: dict[str, str] = {
    "Capabilities: Each field defaults": "API-02",
    "Capabilities: Some promises need": "API-10",
    "Capabilities: guarantee:": "ACK-16 API-09 FLT-02 FLT-05 FLT-06 FLT-16",
    "Capabilities: receipt:": "DUR-06",
    "Capabilities: settlement:": "ACK-08",
    "Capabilities: redelivery:": "ACK-02 ACK-12 ACK-15 ACK-25 GRP-07",
    "Capabilities: delayed_retry:": "ACK-11 PSN-09",
    "Capabilities: delivery_count:": "ACK-10 ACK-24 ACK-27",
    "Capabilities: ordering:": "ORD-01 ORD-02 ORD-03 ORD-05 ORD-10",
    "Capabilities: subscription:": "DUR-03 DUR-08 LIF-12",
    "Capabilities: replay:": "UNR-07 UNR-08 UNR-10 UNR-11 UNR-15",
    "Capabilities: durability:": "DUR-01 DUR-02 DUR-04 DUR-05",
    "Capabilities: unroutable:": "UNR-01 UNR-09 UNR-12 UNR-13 UNR-14",
    "Capabilities: max_message_bytes:": "SIZ-01 SIZ-02 SIZ-03",
    "capabilities": "API-03",
    "transactional": "API-11",
    "MessageBroker: The program can make it": "LIF-04 PUB-17",
    "MessageBroker: Several tasks": "LIF-13 ORD-07 ORD-09 PUB-07 PUB-18",
    "MessageBroker: It serves one event loop": "API-07",
    "MessageBroker: It never blocks": "FLW-07",
    "MessageBroker: It never runs a handler": "LEK-06 LEK-08 PUB-09 PUB-15 PUB-16 UNR-03",
    "MessageBroker: Every call returns": "FLT-18 PUB-11",
    "MessageBroker: It does not retry": "PUB-14",
    "MessageBroker: A cancelled call": "API-06 PUB-08",
    "MessageBroker: After `await aclose()`": "LIF-01 LIF-02 LIF-03 LIF-07 LIF-09 LIF-10 LIF-23 PUB-10",
    "MessageBroker: An error of the service": "API-01",
    "MessageBroker: No log record": "FRN-08 OBS-04 OBS-05 SEC-05",
    "send_message": "PUB-01",
    "send_message: EncodingError:": "PUB-13",
    "send_message: BrokerUnavailable:": "PUB-03 SEC-01 SEC-02",
    "send_message: AccessRefused:": "SEC-03 SEC-04",
    "send_message: MessageRejected:": "FLW-05 PUB-05 PUB-20",
    "send_message: MessageUnroutable:": "UNR-02",
    "send_message: OutcomeUnknown:": "FLT-22 PUB-04",
    "send_messages": "PUB-06",
    "codec: The body is one JSON object": "ENC-07",
    "Topic: Each part may be any text": "ENC-06 GRP-09 GRP-18 ISO-01 ISO-02 SUB-14",
    "subscribe: Groups:": "ACK-23 ACK-31 GRP-01 GRP-02 GRP-03 GRP-05 GRP-06 GRP-10 GRP-13 GRP-15 GRP-16 GRP-17 SUB-12",
    "subscribe: Start:": "GRP-08 PUB-02 SUB-01 SUB-19 UNR-04 UNR-06",
    "subscribe: Prefetch:": "API-12 FLW-01 FLW-02 FLW-04 FLW-14 FLW-15 FLW-22 GRP-04 GRP-19 SUB-21",
    "subscribe: Waiting for a key:": "FLW-17 FLW-23 ORD-11 ORD-12",
    "subscribe: Isolation:": "FRN-01 FRN-05 FRN-09 SEC-07",
    "subscribe: Several subscriptions:": (
        "FLW-09 FLW-16 GRP-11 ISO-04 ISO-08 ISO-09 LIF-18 SIZ-05 SUB-04 SUB-05 SUB-06 SUB-08 SUB-17"
    ),
    "subscribe: Waiting:": "FLW-12 SUB-13",
    "subscribe: Reconnecting:": (
        "FLT-01 FLT-03 FLT-04 FLT-07 FLT-08 FLT-09 FLT-10 FLT-11 FLT-12 FLT-13 FLT-14 FLT-15 FLT-20 FLT-21 FLT-23 "
        "FLT-24 FLW-08 LEK-04 LIF-22 OBS-07 SUB-15 SUB-22"
    ),
    "subscribe: End:": "ACK-14 ACK-26 LEK-05 LEK-10 LIF-08 LIF-11 LIF-19 SUB-03 SUB-10 SUB-18 SUB-20",
    "subscribe: UnsupportedCapability:": "GRP-14",
    "subscribe: BrokerUnavailable:": "LIF-17",
    "subscribe: BrokerClosed:": "SUB-16",
    "Delivery": "SUB-07",
    "Delivery: A delivery may also stay": "ACK-05 ACK-18 HDR-09 PSN-01 PSN-02 PSN-10 SEC-06",
    "Delivery: The transport passes a message on": (
        "ENC-01 ENC-02 ENC-03 ENC-04 ENC-08 FRN-04 FRN-06 HDR-01 HDR-02 HDR-03 HDR-04 HDR-06 HDR-07 HDR-11 HDR-12 "
        "HDR-13 HDR-14 PSN-06 SEC-09 SIZ-04"
    ),
    "Delivery: topic:": "ACK-34 FRN-07",
    "Delivery: attempt:": "ACK-30",
    "receive_nowait": "FLW-24",
    "make_room": "FLW-21",
    "Settler: `Delivery` calls one": "ACK-06 ACK-19",
    "Settler: A call that fails": "ACK-07 ACK-17 ACK-28 ACK-29 ACK-32 ACK-35",
    "ack": "ACK-01",
    "ack: Return when": "ACK-21 ACK-22",
    "retry": "ACK-03 ACK-04 ACK-33 PSN-04 PSN-16",
    "dead_letter": "ACK-09 ACK-20",
    "dead_letter: The transport receives": "FRN-02 FRN-03",
    "Transport": "API-04",
    "aclose: Nothing remains:": "LEK-01 LEK-02 LEK-03 LEK-07",
    "Consumer: The consumer settles": "PSN-11 PSN-13 SUB-11",
    "Consumer: concurrency:": "FLW-13",
    "Consumer: prefetch:": "FLW-18",
    "Consumer: retry:": "PSN-14 PSN-15",
    "Consumer: handler_timeout:": "PSN-07",
    "Consumer: drain_timeout:": "LIF-05 LIF-06 LIF-14 LIF-20 LIF-21",
    "Health: connected:": "OBS-06",
    "Health: in_flight:": "LEK-09",
}
"""The rules, each by its place and its first words (without them: the first paragraph), with their scenarios."""

NOTHING_REMAINS = "aclose: Nothing remains:"
"""The rule that a task or file breaks which is left behind."""

CONTRACT = Contract(_PLACES, RULES)
rule = CONTRACT.rule
