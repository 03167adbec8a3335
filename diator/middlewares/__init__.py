"""Middlewares: code around the handling of each request or delivery."""

from diator.middlewares.base import BaseMiddleware, Handle, Middleware, MiddlewareOf, only_for
from diator.middlewares.logging import LoggingMiddleware

__all__ = ["BaseMiddleware", "Handle", "LoggingMiddleware", "Middleware", "MiddlewareOf", "only_for"]
