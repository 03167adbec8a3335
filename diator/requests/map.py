"""The older place of `RequestMap`, which is in `diator.requests`."""

from diator.exceptions import HandlerNotFound as RequestHandlerDoesNotExist
from diator.requests import RequestMap

__all__ = ["RequestHandlerDoesNotExist", "RequestMap"]
