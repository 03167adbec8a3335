"""Requests, their handlers, and the map from one to the other."""

from diator._handlers import Events
from diator.requests._requests import HandlesRequest, Request, RequestHandler, RequestMap

__all__ = ["Events", "HandlesRequest", "Request", "RequestHandler", "RequestMap"]
