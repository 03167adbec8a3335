from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncContextDecorator,
    ContextDecorator,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Never, Protocol, Self, TypeAlias, TypeVar, cast, get_args, get_origin, overload

from diator._hints import Parameter, function_of, hints_of, name_of, parameters_of
from diator.container.base import AnyClass, Construction, Contexts, Resolver, Shared
from diator.context import MessageContext, current_message, needed_message
from diator.exceptions import ResolutionError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Lifetime: TypeAlias = Literal["transient", "scoped", "singleton"]
#: "unknown": what the factory returns decides, each time. It may have to be awaited, or to be opened.
Kind: TypeAlias = Literal["plain", "resource", "unknown"]


class _Constructor(Protocol[T_co]):
    def __call__(self, *args: Any, **kwargs: Any) -> T_co: ...


class _Exactly(Protocol[T]):
    def __subclasses__(self) -> list[type[T]]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> T: ...


#: As `AnyClass`, but T is the class itself, never a common base of it and of another argument, so that type checkers
#: refuse what does not belong together. mypy takes T from `_Constructor`. pyright tries the two in the order of their
#: names, and takes T from `__subclasses__`, the first method. `tests/typing/containers.py` shows what they refuse.
_Class: TypeAlias = _Exactly[T] | _Constructor[T]


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How to build one type."""

    call: Callable[..., Any]
    needs: dict[str, type]
    kind: Kind
    lifetime: Lifetime
    optional: frozenset[str]


#: What a parameter needs whose type is `MessageContext | None`, or which has a default.
_PERHAPS: Any = MessageContext | None
#: What the container builds without a registration, anew each time.
_OF_MESSAGE: dict[object, _Recipe] = {
    type_: _Recipe(call=call, needs={}, kind="plain", lifetime="transient", optional=frozenset())
    for type_, call in ((MessageContext, needed_message), (_PERHAPS, current_message))
}
_NEEDED = _OF_MESSAGE[MessageContext]


class Container:
    """
    Builds handlers and their dependencies, from the type hints of their constructors.

    Register the dependencies; handlers need no registration. A parameter with a default keeps the default unless its
    type is registered. `MessageContext`, the context of the message that is being handled, needs no registration.

    There are three lifetimes. *transient*: a new object each time. *scoped*: one object per send, shared by the request
    handler and the domain event handlers. *singleton*: one object per container, built when it is first needed. A
    factory that yields its object, or returns a context manager, is a resource. The container closes a resource when
    its lifetime ends: at the end of the unit of work or in `aclose`, the last opened first.

    Register everything before the first send. Several tasks of one event loop may resolve objects at once.
    """

    def __init__(self) -> None:
        self._recipes: dict[object, _Recipe] = {}
        self._unregistered: dict[type, _Recipe] = {}
        self._singletons: dict[object, Any] = {}
        self._being_made: dict[type, tuple[asyncio.Event, asyncio.Task[Any] | None]] = {}  # and by which task
        self._contexts = Contexts()

    # -- registration --------------------------------------------------------------------------------------------

    @overload
    def register(self, type_: type[T], *, lifetime: Lifetime | None = None) -> None: ...
    @overload
    def register(
        self,
        type_: _Class[T],
        factory: Callable[..., T | Awaitable[T] | Iterator[T] | AsyncIterator[T]]
        | Callable[..., AbstractContextManager[T] | AbstractAsyncContextManager[T]],
        *,
        lifetime: Lifetime | None = None,
    ) -> None: ...
    def register(
        self, type_: Any, factory: Callable[..., Any] | None = None, *, lifetime: Lifetime | None = None
    ) -> None:
        """
        Build *type_* with its own constructor, or with *factory*. Parameters are resolved by their type hints.

        A factory may be any callable. What it returns is awaited if it is awaitable, unless it is a *type_* itself. A
        generator (sync or async) that yields the object once, and a function whose return annotation is a context
        manager, are resources; their default lifetime is *scoped*. All others are *transient* by default.

        Raises:
            ResolutionError: *type_* is already registered, a parameter has no type hint, *lifetime* is unknown, or a
                resource is transient.
        """
        if lifetime not in {None, *get_args(Lifetime)}:
            problem = f"the lifetime must be one of {', '.join(get_args(Lifetime))}, and it is {lifetime!r}"
            raise ResolutionError([name_of(type_)], problem)
        if self.is_registered(type_):
            raise ResolutionError([name_of(type_)], f"{name_of(type_)} is already registered; register it once")
        recipe = _recipe(type_, factory or type_, lifetime)
        if lifetime == "transient" and recipe.kind == "resource":
            raise ResolutionError(
                [name_of(type_)], f"{name_of(type_)} is a resource, so its lifetime must be scoped or singleton"
            )
        self._recipes[type_] = recipe

    # Nobody passes the function: with it, mypy takes T from *type_* alone.
    def register_instance(self, type_: _Class[T], instance: T | Callable[[T], Never]) -> None:
        """Use *instance* for every *type_*. The container never closes it. ResolutionError if *type_* is registered."""
        if self.is_registered(type_):
            raise ResolutionError([name_of(type_)], f"{name_of(type_)} is already registered; register it once")
        self._singletons[type_] = instance

    def is_registered(self, type_: object) -> bool:
        """Return whether *type_* is registered, so that a handler can depend on it."""
        return type_ in self._recipes or type_ in self._singletons

    def is_shared(self, type_: type) -> bool:
        """Return whether *type_* is a singleton. Handlers that raise events must not be."""
        recipe = self._recipes.get(type_)
        return recipe.lifetime == "singleton" if recipe else type_ in self._singletons

    # -- resolution ----------------------------------------------------------------------------------------------

    async def resolve(self, type_: AnyClass[T], /) -> T:
        """
        Return a *type_* that needs no scope.

        Raises:
            ResolutionError: A dependency is not registered, a type depends on itself, or a dependency is scoped.
        """
        return cast("T", await self._make(cast("type[T]", type_), None, None, ()))

    def factory(self, type_: type[T], /) -> Construction[T] | None:
        """Return a function that builds a *type_*; None if a dependency is awaited, scoped or a resource."""
        self._check(type_, ())
        return self._compile(type_, ())

    def scope(self, shared: Shared, /) -> AbstractAsyncContextManager[Resolver]:  # keeps its own state
        """Open the scope of one send, see `ScopingResolver.scope`."""
        return _Scope(self)

    async def aclose(self) -> None:
        """Close all singletons that are resources, the last opened first. Registered instances stay open."""
        contexts, self._contexts = self._contexts, Contexts()
        for type_ in self._recipes:
            self._singletons.pop(type_, None)
        await contexts.leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- implementation ------------------------------------------------------------------------------------------

    def _recipe(self, type_: type, path: tuple[type, ...]) -> _Recipe:
        """Return the recipe of *type_*. A type at the start of the path, such as a handler, needs no registration."""
        if type_ in path:
            raise _cycle((*path, type_))
        if recipe := self._recipes.get(type_) or _OF_MESSAGE.get(type_):
            return recipe
        if path:
            raise ResolutionError(
                [*map(name_of, path), name_of(type_)],
                f"{name_of(type_)} is not registered; call register({name_of(type_)}, …) or register_instance",
            )
        return self._own_recipe(type_)

    def _own_recipe(self, type_: type) -> _Recipe:
        """Return the recipe of a type that is not registered. Computing it takes longer than a send."""
        if (recipe := self._unregistered.get(type_)) is None:
            recipe = self._unregistered[type_] = _recipe(type_, type_, "transient")
        return recipe

    def _needs(self, recipe: _Recipe) -> dict[str, type]:
        return {
            name: MessageContext if type_ is _PERHAPS and self.is_registered(MessageContext) else type_
            for name, type_ in recipe.needs.items()
            if self.is_registered(type_) or name not in recipe.optional
        }

    def _check(self, type_: type, path: tuple[type, ...], *, within: Lifetime = "transient") -> None:
        """Check *type_* and all of its dependencies, so that errors appear when the mediator is made."""
        if type_ in self._singletons:
            return
        recipe = self._recipe(type_, path)
        if within == "singleton" and recipe.lifetime == "scoped":
            steps = [*map(name_of, path), name_of(type_)]
            problem = f"{name_of(type_)} is scoped, and a singleton depends on it; give both the same lifetime"
            raise ResolutionError(steps, problem)
        if within == "singleton" and recipe in _OF_MESSAGE.values():
            problem = "MessageContext is another one for each message, and a singleton depends on it; let it call "
            raise ResolutionError([*map(name_of, path), "MessageContext"], f"{problem}current_message()")
        for needed in self._needs(recipe).values():
            self._check(
                needed, (*path, type_), within="singleton" if "singleton" in (within, recipe.lifetime) else "transient"
            )

    def _compile(self, type_: type[T], path: tuple[type, ...]) -> Construction[T] | None:
        if type_ in self._singletons and type_ not in self._recipes:
            return Construction(_given, self._singletons[type_])
        recipe = self._recipes.get(type_) or _OF_MESSAGE.get(type_) or self._own_recipe(type_)
        if recipe.kind != "plain" or recipe.lifetime == "scoped":
            return None
        if recipe is _NEEDED:
            return Construction(recipe.call, *path)
        needs: dict[str, Construction[Any]] = {}
        for name, needed in self._needs(recipe).items():
            construction: Construction[Any] | None = self._compile(needed, (*path, type_))
            if construction is None:
                return None
            needs[name] = construction
        call, arguments = _call(recipe.call, needs)
        if recipe.lifetime == "singleton":
            return Construction(self._once(type_, call, arguments))
        return Construction(call, *arguments, is_new=recipe.call is type_ and _makes_new(type_))

    def _once(self, type_: type[T], call: Callable[..., T], arguments: Sequence[Any]) -> Callable[[], T]:
        made = self._singletons

        def call_once() -> T:
            if type_ not in made:
                made[type_] = call(*arguments)
            value: T = made[type_]
            return value

        return call_once

    async def _make(
        self, type_: type, scope: dict[object, object] | None, contexts: Contexts | None, path: tuple[type, ...]
    ) -> Any:
        if type_ in self._singletons:
            return self._singletons[type_]
        if scope is not None and type_ in scope:
            return scope[type_]
        recipe = self._recipe(type_, path)
        if recipe.lifetime == "singleton":
            return await self._make_singleton(type_, recipe, path)
        if recipe.lifetime == "scoped" and scope is None:
            raise _no_scope((*path, type_))
        made = await self._run(recipe, scope, contexts, (*path, type_))
        if scope is not None and self._recipes.get(type_, recipe).lifetime == "scoped":
            scope[type_] = made
        return made

    async def _make_singleton(self, type_: type, recipe: _Recipe, path: tuple[type, ...]) -> Any:
        while type_ not in self._singletons:
            task = asyncio.current_task()
            if other := self._being_made.get(type_):
                if other[1] is task:  # a factory resolves it, and would wait for itself
                    raise _cycle((*path, type_))
                await other[0].wait()
                continue
            made = asyncio.Event()
            self._being_made[type_] = made, task
            try:
                self._singletons[type_] = await self._run(recipe, None, self._contexts, (*path, type_))
            finally:
                del self._being_made[type_]
                made.set()
        return self._singletons[type_]

    async def _run(
        self, recipe: _Recipe, scope: dict[object, object] | None, contexts: Contexts | None, path: tuple[type, ...]
    ) -> Any:
        needs = {name: await self._make(needed, scope, contexts, path) for name, needed in self._needs(recipe).items()}
        made = recipe.call(*path[:-1]) if recipe is _NEEDED else recipe.call(**needs)
        is_resource = recipe.kind == "resource"
        if recipe.kind == "unknown" and not _is_a(made, type_ := path[-1]):
            if inspect.isawaitable(made):
                made = await made
            is_resource = not _is_a(made, type_) and _is_resource(made)
            if is_resource:
                lifetime: Lifetime = "singleton" if recipe.lifetime == "singleton" else "scoped"
                self._recipes[type_] = replace(recipe, lifetime=lifetime)
        if is_resource:
            if contexts is None:
                raise _no_scope(path)
            return await contexts.enter(_as_context(made))
        return made


class _Scope:
    """The scope of one send."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._made: dict[object, object] = {}
        self._contexts = Contexts()

    async def resolve(self, type_: type[T], /) -> T:
        return cast("T", await self._container._make(type_, self._made, self._contexts, ()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._contexts.leave(error)


def _recipe(type_: type, factory: Callable[..., Any], lifetime: Lifetime | None) -> _Recipe:
    """Return how to call *factory*, and which types its parameters need."""
    if inspect.isabstract(factory) or getattr(factory, "_is_protocol", False):
        missing = ", ".join(sorted(getattr(factory, "__abstractmethods__", ()))) or "a protocol"
        raise ResolutionError(
            [name_of(type_)], f"{name_of(factory)} is abstract ({missing}); register a factory for it"
        )
    call: Callable[..., Any] = factory
    try:
        parameters = parameters_of(factory)
        kind = _kind(type_, factory)
    except TypeError as error:
        raise ResolutionError([name_of(type_)], str(error)) from error
    if by_position := [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_ONLY]:
        call = _by_position(call, by_position)
    for parameter in parameters:
        if parameter.hint is None and not parameter.has_default:
            problem = f"parameter {parameter.name!r} of {name_of(factory)} has no type hint; add one"
            raise ResolutionError([name_of(type_)], problem)
    return _Recipe(
        call=call,
        needs={each.name: _PERHAPS if _asks(each) and each.may_be_none else each.hint for each in parameters},
        optional=frozenset(each.name for each in parameters if each.has_default and not _asks(each)),
        kind=kind,
        lifetime=lifetime or ("scoped" if kind == "resource" else "transient"),
    )


def _asks(parameter: Parameter) -> bool:
    return parameter.hint is MessageContext


def _kind(type_: type, factory: Callable[..., Any]) -> Kind:
    """Return whether *factory* certainly returns an object, certainly a resource, or what only a call shows."""
    function = function_of(factory)
    if isinstance(function, type):
        return "plain"
    inner = inspect.unwrap(function)
    returned = hints_of(factory).get("return")
    class_ = get_origin(returned) or returned
    if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
        return "resource"
    if inspect.iscoroutinefunction(inner) or inner is not function or not isinstance(class_, type):
        return "unknown"  # a decorator copies the annotations, and may return something else
    if returned == type_:
        return "plain"
    if class_ in (AbstractContextManager, AbstractAsyncContextManager):
        return "resource"
    vague = class_ in (object, Any) or issubclass(class_, (Awaitable, Iterator, AsyncIterator))
    return "unknown" if vague else "plain"


def _cycle(path: Sequence[type]) -> ResolutionError:
    return ResolutionError([*map(name_of, path)], f"{name_of(path[-1])} depends on itself; break the cycle")


def _no_scope(path: Sequence[type]) -> ResolutionError:
    problem = f"{name_of(path[-1])} is scoped, and no scope is open; resolve it inside of a send"
    return ResolutionError([*map(name_of, path)], problem)


def _is_a(made: object, type_: type) -> bool:
    try:
        return isinstance(made, type_)
    except TypeError:  # a protocol or a generic alias
        return False


def _is_resource(made: object) -> bool:
    # An object with `__aenter__` may be what the program wants to have, such as a session. One of contextlib is not.
    opened = isinstance(made, (ContextDecorator, AsyncContextDecorator))
    return opened or inspect.isgenerator(made) or inspect.isasyncgen(made)


def _as_context(made: Any) -> AbstractContextManager[Any] | AbstractAsyncContextManager[Any]:
    def iterate() -> Generator[Any]:
        return cast("Generator[Any]", made)

    def iterate_later() -> AsyncGenerator[Any]:
        return cast("AsyncGenerator[Any]", made)

    if inspect.isasyncgen(made):
        return asynccontextmanager(iterate_later)()
    return contextmanager(iterate)() if inspect.isgenerator(made) else made


def _given(instance: T) -> T:
    return instance


def _call(call: Callable[..., T], needs: dict[str, Construction[Any]]) -> tuple[Callable[..., T], Sequence[Any]]:
    """Return what to call, and with which arguments, so that *call* gets what it needs. Common cases need no dict."""
    parameters = parameters_of(call)[: len(needs)]
    by_position = [each.name for each in parameters if each.by_position] == [*needs]
    if all(each.call is _given for each in needs.values()):
        instances = {name: each.arguments[0] for name, each in needs.items()}
        return (call, [*instances.values()]) if by_position else (partial(call, **instances), ())
    match [*needs.values()]:
        case [only] if by_position:
            needed, its_arguments = only.call, only.arguments
            return (lambda: call(needed(*its_arguments))), ()
        case _:
            return (lambda: call(**{name: each.call(*each.arguments) for name, each in needs.items()})), ()


def _makes_new(type_: type) -> bool:
    """Return whether each call of a class makes a new object of that class. `__new__` or a metaclass can change it."""
    return getattr(type_, "__new__") is object.__new__ and type(type_).__call__ is type.__call__  # noqa: B009


def _by_position(call: Callable[..., T], names: Sequence[str]) -> Callable[..., T]:
    def call_by_position(**arguments: Any) -> T:
        return call(*[arguments.pop(name) for name in names if name in arguments], **arguments)

    return call_by_position
