"""The optional base class of responses."""


class Response:
    """
    The optional base class of what a request handler returns.

    It has no fields, so a dataclass, an attrs class, or a pydantic or msgspec model may derive from it. A handler may
    also return a value of any other type.
    """

    __slots__ = ()
