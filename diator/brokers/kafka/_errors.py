"""The errors of aiokafka and of Kafka, translated into diator's."""

from __future__ import annotations

import asyncio
from uuid import UUID

from aiokafka import errors

from diator._text import explained
from diator.brokers.batching import own_error
from diator.exceptions import BrokerError, BrokerUnavailable, MessageRejected, OutcomeUnknown


class InvalidRecord(errors.BrokerResponseError):  # type: ignore[misc]  # aiokafka comes without types
    """An error of Kafka that aiokafka does not know, such as for a message without a key in a compacted topic."""

    errno = 87
    message = "INVALID_RECORD"
    description = "The broker refused a record, such as one without a key for a compacted topic."


errors.kafka_errors.setdefault(InvalidRecord.errno, InvalidRecord)

# aiokafka raises more than its own errors: those of the network, and failed assertions and lookups where it has lost a
# connection or forgotten a topic in the meantime.
CLIENT_ERRORS = (
    errors.KafkaError,
    errors.ConsumerStoppedError,
    OSError,
    asyncio.TimeoutError,
    AssertionError,
    AttributeError,
    LookupError,
    ValueError,
)
NO_RIGHT = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)
TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)

_BROKEN_PRODUCER = (
    errors.ProducerFenced,
    errors.OutOfOrderSequenceNumber,
    errors.InvalidProducerEpoch,
    errors.UnknownProducerId,
    errors.UnknownError,
)


def send_error(error: BaseException, message_id: UUID | None, *, handed_over: bool) -> BrokerError:
    """
    Return the send error for one message, with *error* as its cause.

    *handed_over*: whether the message may have been sent before the error.
    """
    if isinstance(error, BrokerError):
        return own_error(error, message_id)
    translated = _translated(error, message_id, handed_over=handed_over)
    translated.__cause__ = error
    return translated


def _translated(error: BaseException, message_id: UUID | None, *, handed_over: bool) -> BrokerError:
    problem = explained(error)
    if isinstance(error, TOO_LARGE):
        remedy = "raise max.message.bytes of its topic, or send a smaller message"
        return MessageRejected(f"Kafka refused it as too large ({problem}); {remedy}", message_id=message_id)
    if refused(error):
        return MessageRejected(f"Kafka refused it ({problem})", message_id=message_id)
    if not handed_over:
        return BrokerUnavailable(f"Kafka is not available ({problem})", message_id=message_id)
    return OutcomeUnknown(f"Kafka did not confirm it ({problem}); it may have arrived", message_id=message_id)


def refused(error: BaseException) -> bool:
    """Tell whether *error* is an answer of Kafka, which would answer in the same way again."""
    if isinstance(error, NO_RIGHT):
        return True
    return (
        isinstance(error, errors.BrokerResponseError)
        and not error.retriable
        and not isinstance(error, _BROKEN_PRODUCER)
    )
