"""The older place of `Request`, which is in `diator.requests`."""

from diator.requests import Request

__all__ = ["Request"]
