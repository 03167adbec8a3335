"""Middlewares: code around the handling of each request or delivery."""

from diator.middlewares.base import BaseMiddleware, Handle, Middleware
from diator.middlewares.logging import LoggingMiddleware

__all__ = ["BaseMiddleware", "Handle", "LoggingMiddleware", "Middleware"]
