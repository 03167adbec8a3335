"""Defects: the content of a message changes on its way."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from dataclasses import replace

from diator.brokers.base import Delivery
from diator.brokers.capabilities import Capabilities
from diator.brokers.message import Message
from diator.testing.saboteurs._base import Saboteur, caught_by, fields_of


class _Rewrites(Saboteur):
    async def send_message(self, message: Message, /) -> None:
        await super().send_message(self.rewritten(message))

    def rewritten(self, message: Message) -> Message:
        raise NotImplementedError


@caught_by("HDR-01", "HDR-06", "HDR-12", "SIZ-04", "ENC-08")
class DropsHeaders(_Rewrites):
    """Sends no headers."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={})


@caught_by("HDR-02")
class SpeaksAscii(_Rewrites):
    """Sends only headers that are ASCII."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={k: v for k, v in message.headers.items() if k.isascii() and v.isascii()})


@caught_by("HDR-02")
class FoldsHeaders(_Rewrites):
    """Treats header names that differ only in case as the same name."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={name.lower(): value for name, value in message.headers.items()})


@caught_by("HDR-01", "HDR-06")
class AddsHeaders(_Rewrites):
    """Adds a trace header that nobody sent."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={"traceparent": "00-0-0-00", **message.headers})


@caught_by("SIZ-04")
class LimitsHeaders(_Rewrites):
    """Sends only the first 64 headers."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers=dict([*message.headers.items()][:64]))


@caught_by("HDR-07")
class SplitsHeaders(_Rewrites):
    """Cuts a header value at the end of the line."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, headers={k: v.split("\n")[0].split("\0")[0] for k, v in message.headers.items()})


@caught_by("HDR-03")
class TakesHeadersForFields(Saboteur):
    """Reads the name of a message from a header."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        envelope = fields_of(delivery.body)
        if isinstance(envelope.get("headers"), dict) and (name := envelope["headers"].get("message_name")):
            delivery.body = json.dumps({**envelope, "message_name": name}).encode()
        return delivery


@caught_by("HDR-11", "ENC-08")
class DropsKeys(_Rewrites):
    """Orders by the key and does not send it."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, key=None)


@caught_by("ENC-02")
class SkipsEmpty(Saboteur):
    """Treats an empty payload as no message."""

    async def send_message(self, message: Message, /) -> None:
        if message.payload_json != b"{}":
            await super().send_message(message)


@caught_by("ENC-03")
class Normalises(_Rewrites):
    """Composes characters."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=unicodedata.normalize("NFC", message.payload_json.decode()).encode())


@caught_by("ENC-04")
class EncodesAgain(_Rewrites):
    """Decodes the payload and encodes it again."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=json.dumps(json.loads(message.payload_json)).encode())


@caught_by("ENC-01")
class SpeaksC(_Rewrites):
    """Cuts text at a NUL character."""

    def rewritten(self, message: Message) -> Message:
        return replace(message, payload_json=message.payload_json.replace(rb"\u0000", b""))


@caught_by("ENC-07")
class HasItsOwnEnvelope(Saboteur):
    """Encodes the fields of a message in another order."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        if envelope := fields_of(delivery.body):
            delivery.body = json.dumps({"payload": None, **envelope}, separators=(",", ":")).encode()
        return delivery


@caught_by("SIZ-01")
class Truncates(Saboteur):
    """Cuts bodies that do not fit into its buffer."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        delivery.body = delivery.body[:65_536]
        return delivery


@caught_by("SIZ-02")
class AllowsLessThanPromised(Saboteur):
    """Accepts one byte less than it promises."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, max_message_bytes=self._max_message_bytes + 1)


@caught_by("SIZ-03")
class AllowsMoreThanPromised(Saboteur):
    """Accepts more bytes than it promises."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, max_message_bytes=self._max_message_bytes - 100)


@caught_by("SIZ-05", "FLW-09", "SUB-06")
class BlocksOnLargeMessages(Saboteur):
    """Lets a large message, or many messages, hold up everything else."""

    async def deliver(self, delivery: Delivery) -> Delivery:
        if len(delivery.body) > 100_000 or sum(map(len, self._queues)) > 15:  # noqa: PLR2004
            await asyncio.sleep(1)
        return delivery
