"""The errors of endpoints: a fault of the server, or a request that it refuses."""

from __future__ import annotations


class EndpointError(Exception):
    """A request without an answer.

    `status` is the reply's HTTP status; None where there was no reply, or where the reply was found
    wrong here.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointFault(EndpointError):
    """The endpoint failed, and the request is not the cause.

    It is worth sending again, there or elsewhere.

    `retry_after_s` is how long the server asked for no requests. `breaks` is False for a server
    that is only busy: this does not count towards its circuit breaker.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        breaks: bool = True,
    ) -> None:
        super().__init__(message, status=status)
        self.retry_after_s = retry_after_s
        self.breaks = breaks


class BadReply(EndpointFault):
    """A reply with a status of success and the wrong content."""


class RequestRefused(EndpointError):
    """The server refuses this request for its content.

    Sending it again would not help; another request may pass.
    """
