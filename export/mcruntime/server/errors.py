"""What a client is told when it does not get an answer: one class for every way out, each with its HTTP status.

The texts go to strangers: no path, no process id, no version, no name of ours but the model's.
"""

from __future__ import annotations

import logging

from mcruntime.errors import DataError, ImageTooLargeError, InputError, McdeployError

RETRY_AFTER_S = 1
logger = logging.getLogger("mcruntime.server")


class RequestError(InputError):
    """The request cannot be answered.

    Attributes:
        status: the HTTP status; gRPC's code follows from it.
        retry_after_s: seconds after which the same request may succeed; None: never.
    """

    def __init__(self, message: str, status: int = 400, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class NotFoundError(RequestError):
    """No such model, version or path."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 404)


class TooLargeError(RequestError):
    """More bytes, pixels or images than allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 413)


class OverloadedError(RequestError):
    """No room; the client may come back."""

    def __init__(self, message: str = "Exceeds maximum queue size; try again") -> None:
        super().__init__(message, 503, RETRY_AFTER_S)


class DeadlineError(RequestError):
    """Not done in time."""

    def __init__(self, message: str = "Request timeout expired") -> None:
        super().__init__(message, 504)


class UnavailableError(RequestError):
    """The server or the model is being shut down or unloaded."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, RETRY_AFTER_S)


def as_told(error: Exception, request_id: str) -> RequestError:
    """What a client is told of any error; what it must not be told is logged."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DataError):  # an image; its text names no path
        return RequestError(str(error), 413 if isinstance(error, ImageTooLargeError) else 400)
    if isinstance(error, McdeployError):
        logger.error("request %s: %s", request_id, error)
        return RequestError("the model could not answer this request", 500)
    logger.error("request %s", request_id, exc_info=error)
    return RequestError("internal server error", 500)
