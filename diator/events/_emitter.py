from __future__ import annotations

import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from diator._handlers import PreparedHandler, Scheduled, WithHeaders
from diator._hints import described, name_of
from diator._options import check_type
from diator.brokers.message import Codec, Message, set_fields
from diator.brokers.sending import (
    Due,
    MessageBroker,
    TransactionalBroker,
    send_one_by_one,
    session_type_of,
    transactional,
)
from diator.container import Container
from diator.container.base import BuildLater, Resolver, Shared, builder, has_scopes, is_registered, is_shared, scopes
from diator.context import correlation_headers
from diator.events._event import Event, check_integration_event, is_integration_event, message_key_of, message_name_of
from diator.events._handler import EventMap
from diator.events._headers import HeaderSource, checked_sources, header_maker
from diator.exceptions import (
    BrokerNotConfigured,
    ConfigurationError,
    DiatorError,
    EncodingError,
    EventHandlersFailed,
    NotAnEvent,
    NotCommitted,
    ResolutionError,
    UnsupportedCapability,
)
from diator.instruments import Instrument, Observer, observer_of

#: Integration events, and their messages.
Outgoing: TypeAlias = list[tuple[Any, Message]]


class _Stored(Outgoing):
    """
    What a transactional broker has stored in the transaction of the unit of work, instead of what is to be sent.

    Attributes:
        was_rolled_back: Returns whether that transaction was rolled back.
    """

    was_rolled_back: Callable[[], bool]


#: The key under which the state of a send holds its `Outgoing` until the middlewares have finished.
OUTGOING = object()

#: The state of `_handle`, for its second call, inside of the scopes that the first one opened.
_Progress: TypeAlias = tuple[Iterator[Any], Outgoing, list[Exception], list[DiatorError]]


class EventEmitter:
    """
    Calls the handlers of domain events, and sends integration events to the message broker.

    Several tasks of one event loop may use it at once.

    Args:
        event_map: The handlers. Default: an empty `EventMap`.
        container: Builds the handlers. Default: the container of the mediator or consumer that uses this emitter, or
            diator's own `Container`.
        message_broker: Sends the integration events, or stores them in the transaction of the unit of work, as an
            outbox does. The emitter does not close it.
        headers: Header sources: each is called with the event when its message is made, inside the unit of work, and
            returns headers for it. Of two with one name, the later one counts.
        codec: The envelope of the integration events. Default: diator's own; that of the outbox, which alone has one
            if *message_broker* is an outbox.
        instrument: Observes the sends, and adds headers, for telemetry.

    Raises:
        ConfigurationError: An argument has the wrong type, or *codec* needs headers and *message_broker* has none, or
            the codec of an outbox was passed here.
    """

    def __init__(
        self,
        event_map: EventMap | None = None,
        container: Resolver | None = None,
        message_broker: MessageBroker | None = None,
        *,
        headers: Sequence[HeaderSource] = (),
        codec: Codec | None = None,
        instrument: Instrument | None = None,
    ) -> None:
        check_parts(event_map=event_map, container=container, message_broker=message_broker)
        self._session_type = session_type_of(message_broker)
        if self._session_type is not None:  # another program sends its messages
            if codec is not None:
                raise ConfigurationError("codec was passed together with an outbox, which sends; pass it to the Outbox")
            codec = getattr(message_broker, "codec", None)
        check_codec(codec, message_broker)
        self._codec = codec
        self._sources = checked_sources(headers)
        self._event_map = EventMap() if event_map is None else event_map
        self._container = container
        self._default_container: Resolver | None = None
        self._broker = message_broker
        self._observer = observer_of(instrument, message_broker)
        # What `emit` may call: without an instrument, and without a transaction.
        self._direct = message_broker if instrument is None and self._session_type is None else None
        self._build_session: BuildLater[Any] | None = None
        #: Whether integration events are sent when the unit of work is over: a process that dies then loses them.
        self._sends_later = message_broker is not None and not transactional(message_broker)
        self._send_messages: Callable[[Sequence[Message]], Awaitable[None]] | None = getattr(
            message_broker, "send_messages", None
        )
        self._plans: dict[type, _Plan] = {}

    async def emit(self, event: object) -> None:
        """
        Call the handlers of *event* if it is a domain event; otherwise send it.

        The events that the handlers raise are handled in the same way; integration events among them are sent last.

        Raises:
            EventHandlersFailed: Handlers of domain events failed. All handlers ran; nothing was sent.
            EncodingError: A value of an integration event would not come back as it is. Nothing was sent.
            ConfigurationError: The class of an integration event cannot travel. Nothing was sent.
            MessageRejected: An integration event is too large, or its name or key too long. Nothing was sent.
            BrokerNotConfigured: An integration event was raised, and this emitter has no broker. Nothing was sent.
            NotAnEvent: An object cannot be an event, or its class is incomplete. Nothing was sent.
            UnsupportedCapability: An event is scheduled, and the broker is not an outbox. Nothing was sent.
            NotCommitted: The broker is an outbox, and the transaction of its messages was not committed.
            BrokerError: The send error of the message, or `MessagesNotSent` if there were several messages.
        """
        plan = self._plans.get(type(event)) or self._plan(type(event))
        if plan.message is not None and self._direct is not None:
            await self._direct.send_message(plan.message(event))
        else:
            await self._send(await self._handle([event], {}))

    # -- the two halves of `emit`: inside of the unit of work, and after it ---------------------------------------

    async def _handle(  # noqa: C901, PLR0912  # one loop without calls, for speed: see below
        self, raised: list[Any], shared: Shared, progress: _Progress | None = None
    ) -> Outgoing:
        """
        Call the handlers of the domain events in *raised*, in their order, and encode the integration events.

        The events that these handlers raise are added to the end of *raised*. Returns the messages to send after the
        unit of work. A transactional broker has stored them already; then it returns what `_send` checks.

        Raises:
            EventHandlersFailed: Handlers failed. All handlers of all events ran.
        """
        remaining, outgoing, failures, refused = progress or (iter(raised), [], [], [])
        for event in remaining:
            try:
                plan = self._plans.get(type(event)) or self._plan(type(event))
                if plan.message is not None:
                    outgoing.append((event, plan.message(event)))
            except DiatorError as error:  # the handlers of the other events run anyway
                refused.append(error)
                continue
            if plan.needs_scope and not has_scopes(shared):
                async with scopes(shared):
                    remaining = itertools.chain((event,), remaining)
                    return await self._handle(raised, shared, (remaining, outgoing, failures, refused))
            for build, arguments, pending_events, handler in plan.steps:
                try:
                    if build is None:
                        await handler.call(event, shared, raised)
                    else:  # what `handler.call` does: without this copy, a send with one domain event costs 7 % more
                        built = build(shared) if arguments is None else build(*arguments)
                        try:
                            await built.handle(event)
                        except BaseException:
                            handler.take_events(built, ())
                            raise
                        if events := pending_events(built):
                            raised += handler.take_events(built, events)
                except Exception as error:  # noqa: BLE001  # all handlers run, then all errors are raised
                    handler.note(error, event)
                    failures.append(error)
        if failures:
            raise EventHandlersFailed(
                "handlers of domain events failed; no integration event was sent", [*failures, *refused]
            )
        if refused:
            raise refused[0]
        if outgoing and transactional(self._broker):
            return await self._store(outgoing, shared)
        return outgoing

    async def _store(self, outgoing: Outgoing, shared: Shared) -> Outgoing:
        """Store *outgoing* in the transaction of this unit of work; in one of its own if it has none."""
        if self._session_type is None:
            await self._send(outgoing)
            return []
        if not has_scopes(shared):
            async with scopes(shared):
                return await self._store(outgoing, shared)
        session = await self._session(shared)
        broker = cast("TransactionalBroker[Any]", self._broker)
        was_rolled_back = await broker.store(
            [message for _, message in outgoing], [_due(event) for event, _ in outgoing], session
        )
        if was_rolled_back is None:
            return []
        stored = _Stored(outgoing)
        stored.was_rolled_back = was_rolled_back
        return stored

    async def _session(self, shared: Shared) -> object:
        """Return the session of the unit of work, from the container."""
        if self._build_session is None:
            if self._container is None and self._default_container is None:
                raise ConfigurationError(
                    "this EventEmitter has no container, and an outbox stores in a session from one; pass container=… "
                    "to it, or raise the event in a handler"
                )
            self._build_session = session_builder(self._used_container(), self._session_type, self._broker)
        return await self._build_session(shared)

    async def _send(self, outgoing: Outgoing, *, is_observed: bool = False) -> None:
        """
        Send the messages that `_handle` returned, in their order. Stop at the first one that is not confirmed.

        Raises:
            NotCommitted: The messages were stored, and their transaction was rolled back.
            BrokerError: The send error of the message, if there was only one message.
            MessagesNotSent: The broker did not confirm all of several messages.
        """
        broker, messages = self._broker, [message for _, message in outgoing]
        if not messages or broker is None:  # without a broker, `_handle` has refused every integration event
            return
        if isinstance(outgoing, _Stored):
            if self._session_type is not None and outgoing.was_rolled_back():
                raise NotCommitted([type(unwrapped(event)) for event, _ in outgoing], self._session_type)
            return
        if self._observer is not None and not is_observed:
            with self._observer.sending(messages):
                await self._send(outgoing, is_observed=True)
        elif len(messages) == 1:
            await broker.send_message(messages[0])
        elif self._send_messages is not None:
            await self._send_messages(messages)
        else:
            await send_one_by_one(broker.send_message, messages)

    # -- preparation ---------------------------------------------------------------------------------------------

    def _wire(self, container: Resolver) -> None:
        """
        Use *container* unless this emitter has its own, and prepare every handler that is bound so far.

        Raises:
            ResolutionError: The container can never build a handler.
            ConfigurationError: This emitter has no container of its own, and already uses another one.
        """
        if self._container is None:
            if self._default_container not in (None, container):
                raise ConfigurationError(
                    "mediators or consumers with different containers share this EventEmitter; pass a container to it"
                )
            self._default_container = container
        if self._session_type is not None:
            if self._used_container() is not container:
                raise ConfigurationError(
                    "this EventEmitter stores in the transaction of the handlers, and has another container than they; "
                    "pass no container to it"
                )
            self._build_session = session_builder(container, self._session_type, self._broker)
        for event_type in self._event_map:
            # A consumer calls the handlers of integration events. This emitter may never send one.
            if not is_integration_event(event_type):
                self._plan(event_type)

    def _used_container(self) -> Resolver:
        container = next((each for each in (self._container, self._default_container) if each is not None), None)
        return Container() if container is None else container

    def _plan(self, event_type: type) -> _Plan:
        """Compute what to do with events of this type. Called once for each type."""
        if event_type is WithHeaders:
            plan = _Plan((), message=self._with_headers)
        elif event_type is Scheduled:
            plan = _Plan((), message=self._scheduled)
        elif is_integration_event(event_type):
            if self._broker is None:
                raise BrokerNotConfigured(event_type)
            self._event_map._reserve_name(event_type)
            plan = _Plan(
                (), message=_message_factory(event_type, self._broker, self._codec, self._sources, self._observer)
            )
        else:
            handlers = self._event_map._freeze(event_type)
            if not handlers and issubclass(event_type, type):
                raise NotAnEvent("a class was raised; raise an instance of the class")
            if not handlers and not issubclass(event_type, Event):
                raise NotAnEvent(
                    f"an object of {name_of(event_type)} was raised, which is neither an Event nor bound to a handler; "
                    "derive it from an event class"
                )
            container = self._used_container()
            plan = _Plan([PreparedHandler(handler, container) for handler in handlers])
        self._plans[event_type] = plan
        return plan

    def _with_headers(self, raised: WithHeaders) -> Message:
        event_type = type(raised.event)
        if event_type is WithHeaders:
            raise NotAnEvent("headers were passed with a WithHeaders, which has headers already; pass all of them once")
        plan = self._plans.get(event_type) or self._plan(event_type)
        if plan.message is None:
            raise NotAnEvent(f"headers were passed with {name_of(event_type)}, which is not an integration event")
        return plan.message(raised.event, raised.headers)

    def _scheduled(self, raised: Scheduled) -> Message:
        event_type = type(raised.event)
        if event_type is Scheduled:
            raise NotAnEvent("a Scheduled was scheduled again; pass its event")
        plan = self._plans.get(event_type) or self._plan(event_type)
        if plan.message is None:
            raise NotAnEvent(f"{name_of(event_type)} was scheduled, which is not an integration event")
        if self._session_type is None:
            raise UnsupportedCapability(
                name_of(type(self._broker)),
                ["an outbox (has no, needed is yes)"],
                why="a scheduled event",
                remedy="pass an Outbox as message_broker, whose relay sends the event when it is due",
            )
        return plan.message(raised.event)


def unwrapped(event: Any) -> Any:
    """Return the event itself of an event that was raised with headers, or for later."""
    while isinstance(event, (WithHeaders, Scheduled)):
        event = event.event
    return event


def _due(event: Any) -> Due:
    return event.due if isinstance(event, Scheduled) else None


def session_builder(container: Resolver, session_type: type | None, broker: object) -> BuildLater[Any]:
    """
    Return what gets the session of a unit of work from *container*: the one in which *broker* stores.

    It raises ConfigurationError if the handlers of the unit of work get another one.

    Raises:
        ResolutionError: The container cannot build a *session_type*.
        ConfigurationError: The container has one session for all units of work.
    """
    assert session_type is not None, "asked for a broker with sessions only"  # noqa: S101
    name, asking = name_of(session_type), name_of(type(broker))
    if not is_registered(container, session_type, default=True):
        problem = f"{asking} stores in the {name} of a unit of work, which is not registered; register it as scoped"
        raise ResolutionError([asking, name], problem)
    if is_shared(container, session_type):
        raise ConfigurationError(
            f"{name} is registered as a singleton, and {asking} needs one for each unit of work; register it as scoped"
        )
    build: BuildLater[Any] = builder(container, session_type)[1]
    is_checked = False

    async def session(shared: Shared) -> Any:
        nonlocal is_checked
        found = await build(shared)
        if not is_checked:
            await _check_same(build, shared, found)
            is_checked = True
        return found

    return session


async def _check_same(build: BuildLater[Any], shared: Shared, session: object) -> None:
    """Check that *build* returns *session* again. Two are two transactions: nobody would commit the second one."""
    if await build(shared) is not session:
        name = name_of(type(session))
        raise ConfigurationError(
            f"the container returns a new {name} each time; register it as scoped, so that the handlers of a unit of "
            "work, the outbox and the inbox have the same one"
        )


def check_parts(*, event_map: object, container: object, message_broker: object) -> None:
    """Check the types of the arguments when an object is made, before any request fails. None: not passed."""
    check_type("event_map", event_map, EventMap)
    for name, part, method in (("container", container, "resolve"), ("message_broker", message_broker, "send_message")):
        if part is not None and (isinstance(part, type) or not callable(getattr(part, method, None))):
            raise ConfigurationError(f"{name} must be an object with `async def {method}`, and it is {described(part)}")


def check_codec(codec: object, broker: object = None) -> None:
    """Check the codec when an object is made. With *broker*: that it can encode for this transport."""
    if codec is None:
        return
    if isinstance(codec, type) or not all(callable(getattr(codec, each, None)) for each in _METHODS_OF_CODEC):
        methods = ", ".join(_METHODS_OF_CODEC)
        raise ConfigurationError(f"codec must be an object with the methods {methods}, and it is {described(codec)}")
    if broker is not None:
        probe = Message.create(message_name="probe", payload={}, codec=cast("Codec", codec))
        _check_of(broker, probe)[0](probe)


_METHODS_OF_CODEC = ("encode", "headers", "decode")


class _Plan:
    """What to do with events of one type: call the handlers of *steps*, or send the result of *message*."""

    __slots__ = ("message", "needs_scope", "steps")

    def __init__(self, handlers: Sequence[PreparedHandler], message: Callable[..., Message] | None = None) -> None:
        self.steps = [(handler.build, handler.arguments, handler.pending_events, handler) for handler in handlers]
        self.needs_scope = any(handler.needs_scope for handler in handlers)
        self.message = message


#: How many bytes the two ids of a correlation take at most.
_MOST_CORRELATION = 4 * 1024
#: No service refuses a key of so many bytes.
_SHORT_KEY = 16 * 1024


def _check_of(broker: object, empty: Message) -> tuple[Callable[[Message], object], int]:
    """Return what checks a message before it is sent, and which size of a payload needs no check."""
    from diator.brokers.capabilities import Capabilities  # noqa: PLC0415  # as below
    from diator.brokers.codec import encode, headers_with_key  # noqa: PLC0415

    promised: object = getattr(broker, "capabilities", None)
    if not isinstance(promised, Capabilities):  # it promises nothing, or is a mock, which has every method
        return encode, sys.maxsize
    limit, headers_in_body = promised.max_message_bytes or sys.maxsize, promised.headers == "envelope"
    check: Callable[[Message], object] = partial(encode, max_bytes=limit, headers_in_body=headers_in_body)
    check = getattr(broker, "check_message", check)
    if empty.codec is not None:  # it may refuse any value, also one in a header

        def check_all(message: Message) -> None:
            check(message)
            if not headers_in_body:
                headers_with_key(message)

        return check_all, -1
    # The body may contain the key, a part of the payload, once more.
    certainly_fits = (limit - len(encode(empty, headers_in_body=headers_in_body))) // 2
    return check, certainly_fits


def _check_included(event_type: type, key_field: str | None) -> None:
    """Check that the payload contains what its message and its reader need: pydantic can exclude a field."""
    from diator.brokers.payloads import wire_names  # noqa: PLC0415  # as below

    written = wire_names(event_type)
    for name in ("event_id", "event_timestamp", key_field):
        if name is not None and name not in written:
            raise NotAnEvent(f"{name_of(event_type)}.{name} is excluded from the payload, which needs it; include it")


def _message_factory(  # noqa: C901, PLR0915  # one function, for speed
    event_type: Any, broker: object, codec: Codec | None, sources: Sequence[HeaderSource], observer: Observer | None
) -> Callable[..., Message]:
    """
    Return a function that encodes an event. A later change to the event then does not change its message.

    Once it has returned a message, only the service of *broker* can refuse that.
    """
    # Not imported at the top: it is half of the time to import diator, and domain events do not need it.
    from diator.brokers.codec import beginning_of, key_of, payload_encoder, plain_id  # noqa: PLC0415

    check_integration_event(event_type)
    message_type: str = event_type.message_type
    message_name = message_name_of(event_type)
    key_field = message_key_of(event_type)
    encode_payload = payload_encoder(event_type)
    _check_included(event_type, key_field)
    empty = Message(
        message_type=message_type,
        message_name=message_name,
        message_id=UUID(int=0),
        payload_json=b"{}",
        key="0",
        codec=codec,
    )
    check, certainly_fits = _check_of(broker, empty)
    check(empty)  # its name may be too long
    if key_field is not None:
        certainly_fits = min(certainly_fits, _SHORT_KEY)
    ambiguous = "event_id must be a UUID, and event_timestamp must have a time zone, otherwise it is ambiguous"
    of_class: dict[str, object] = {
        "message_type": message_type,
        "message_name": message_name,
        "message_id": None,
        "payload_json": None,
        "key": None,
        "headers": None,
        "_beginning": beginning_of(message_type, message_name),
        "codec": codec,
    }

    is_native = getattr(getattr(broker, "capabilities", None), "headers", None) == "native"
    make_headers, correlates, has_others = header_maker(event_type, sources, observer, is_native=is_native)
    if correlates:
        certainly_fits -= _MOST_CORRELATION
    new = object.__new__

    def message(event: Any, given: Mapping[str, str] | None = None) -> Message:  # noqa: C901  # as above
        message_id = event.event_id
        if type(message_id) is not UUID:
            message_id = plain_id(message_id)
            if type(message_id) is not UUID:
                raise EncodingError(name_of(event_type), ambiguous)
        try:
            payload_json = encode_payload(event)
            timestamp = event.event_timestamp
            fields = of_class.copy()  # a new dictionary of all fields would take twice as long
            if key_field is not None:
                key = getattr(event, key_field)
                fields["key"] = key if key is None or type(key) is str else key_of(key)
        except DiatorError:
            raise
        except Exception as error:
            problem = f"its class raised {name_of(type(error))} while it was encoded"
            raise EncodingError(name_of(event_type), problem) from error
        try:
            zone = timestamp.tzinfo
        except AttributeError:  # None, or no datetime
            zone = None
        if zone is None:
            raise EncodingError(name_of(event_type), ambiguous)
        fields["message_id"] = message_id
        fields["payload_json"] = payload_json
        if has_others or given is not None:
            fields["headers"] = make_headers(event, message_id, payload_json, given)
        elif correlates:
            fields["headers"] = correlation_headers(message_id, payload_json)
        else:
            fields["headers"] = {}
        if codec is not None:
            fields["time"] = timestamp
        message = new(Message)
        set_fields(message, fields)
        if has_others or given is not None or len(payload_json) > certainly_fits:
            check(message)
        return message

    return message
