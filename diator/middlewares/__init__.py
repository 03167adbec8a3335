"""Middlewares: code that surrounds every handler."""

from diator.middlewares.base import BaseMiddleware, Handle, Middleware
from diator.middlewares.logging import LoggingMiddleware

__all__ = ["BaseMiddleware", "Handle", "LoggingMiddleware", "Middleware"]
