"""What a handler answers."""


class Response:
    """
    The optional base of what a handler answers.

    It holds nothing: a dataclass, an attrs class or a model of pydantic or msgspec may derive from it, and a
    handler may answer any other type as well.
    """

    __slots__ = ()
