"""The older place of `RequestHandler`, which is in `diator.requests`."""

from diator.requests import RequestHandler

__all__ = ["RequestHandler"]
