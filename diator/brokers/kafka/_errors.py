"""The errors of aiokafka and of Kafka, translated into diator's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from uuid import UUID

from aiokafka import errors

from diator._text import explained, printable
from diator.brokers.batching import own_error
from diator.brokers.kafka._unconfirmed import Place
from diator.exceptions import (
    AccessRefused,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    MessageRejected,
    OutcomeUnknown,
)


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
    NotImplementedError,
)
NO_RIGHT = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)
_NO_LOGIN = (
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.AuthenticationFailedError,
)
TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)

_BROKEN_PRODUCER = (
    errors.ProducerFenced,
    errors.OutOfOrderSequenceNumber,
    errors.InvalidProducerEpoch,
    errors.UnknownProducerId,
    errors.UnknownError,
)


def not_connected(problems: Mapping[str, BaseException], *, within: float) -> Exception:
    """Return the error for a cluster of which no address could be used *within* so many seconds, with the reasons."""
    for where, error in problems.items():
        if isinstance(error, errors.IllegalSaslStateError):
            remedy = "leave out sasl_mechanism, or use the address of a listener with SASL"
            return AccessRefused(f"Kafka takes no login at {where} ({_problem(error)}); {remedy}")
        if isinstance(error, _NO_LOGIN):
            remedy = "check sasl_mechanism, username and password"
            return AccessRefused(f"Kafka refuses the login at {where} ({_problem(error)}); {remedy}")
    text = "; ".join(f"{where}: {_unreachable(error, within)}" for where, error in problems.items())
    return errors.KafkaConnectionError(text)  # type: ignore[no-any-return]


def _unreachable(error: BaseException, within: float) -> str:
    if isinstance(error, (errors.KafkaConnectionError, ConnectionResetError)):
        return "the other end closed the connection; one side may expect TLS (ssl_context) or a login"
    if isinstance(error, NotImplementedError):
        return f"its version of Kafka does not fit this version of aiokafka ({_problem(error)})"
    return _problem(error, within=within)


def subscription_error(error: Exception, group_id: str | None) -> ConfigurationError | None:
    """Return the error that ends a subscription, because reconnecting does not help against *error*, or None."""
    problem, refused_by = _problem(error), f"Kafka refuses a consumer of the group {group_id}"
    if isinstance(error, NO_RIGHT):
        remedy = "grant its user DESCRIBE and READ on its topics and READ on its group (kafka-acls.sh)"
        return AccessRefused(f"Kafka refuses a subscription ({problem}); {remedy}")
    if isinstance(error, errors.InconsistentGroupProtocolError):
        remedy = (
            "it has consumers of another program, which share its partitions in another way than the assignor "
            "roundrobin; use another group, or end them first"
        )
        return ConfigurationError(f"{refused_by} ({problem}); {remedy}")
    if isinstance(error, errors.InvalidSessionTimeoutError):
        remedy = (
            "choose a session_timeout between Kafka's group.min.session.timeout.ms (by default 6 s) and "
            "group.max.session.timeout.ms (by default 30 min)"
        )
        return ConfigurationError(f"{refused_by} ({problem}); {remedy}")
    if isinstance(error, errors.InvalidGroupIdError):
        return ConfigurationError(f"{refused_by} ({problem}); use another name")
    return None


def _problem(error: BaseException, *, within: float | None = None) -> str:
    """Describe an error. Those of Kafka have their text in their class."""
    if isinstance(error, errors.BrokerResponseError):
        text = " ".join(each for each in error.args if isinstance(each, str)) or error.description
        return printable(f"{type(error).__name__}: {text}".removesuffix(": "))
    return explained(error, within=within)


def send_error(
    error: BaseException, message_id: UUID | None, *, handed_over: bool, place: Place | None = None
) -> BrokerError:
    """
    Return the send error for one message, with *error* as its cause.

    *handed_over*: whether the message may have been sent before the error. *place*: where it goes, if that is known.
    """
    if isinstance(error, BrokerError):
        return own_error(error, message_id)
    translated = _translated(error, message_id, handed_over=handed_over, place=place)
    translated.__cause__ = error
    return translated


def _translated(
    error: BaseException, message_id: UUID | None, *, handed_over: bool, place: Place | None
) -> BrokerError:
    where = "" if place is None else f" for {place[0]}, partition {place[1]}"
    problem = _problem(error)
    if isinstance(error, TOO_LARGE):
        remedy = "raise max.message.bytes of its topic, or send a smaller message"
        return MessageRejected(f"Kafka refused it as too large ({problem}); {remedy}", message_id=message_id)
    if refused(error):
        return MessageRejected(f"Kafka refused it ({problem})", message_id=message_id)
    if not handed_over:
        return BrokerUnavailable(f"Kafka is not available{where} ({problem})", message_id=message_id)
    return OutcomeUnknown(f"Kafka did not confirm it{where} ({problem}); it may have arrived", message_id=message_id)


def refused(error: BaseException) -> bool:
    """Tell whether *error* is an answer of Kafka, which would answer in the same way again."""
    if isinstance(error, NO_RIGHT):
        return True
    return (
        isinstance(error, errors.BrokerResponseError)
        and not error.retriable
        and not isinstance(error, _BROKEN_PRODUCER)
    )
