"""What can be wrong with a reply: the endpoint, or what it was asked."""

from __future__ import annotations


class EndpointError(Exception):
    """A question without an answer. `status` is the reply's HTTP status, None where there was none,
    or where it is our own verdict.
    """

    def __init__(self, words: str, *, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


class EndpointFault(EndpointError):
    """The endpoint did not do its work, through no fault of the question: worth asking again, here
    or elsewhere.

    `retry_after_s` is how long the server asked to be left alone. `breaks` is False for a server
    that is only busy: it does not count towards its circuit breaker.
    """

    def __init__(
        self,
        words: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        breaks: bool = True,
    ) -> None:
        super().__init__(words, status=status)
        self.retry_after_s = retry_after_s
        self.breaks = breaks


class BadReply(EndpointFault):
    """A reply with a status of success that is not what was asked for."""


class RequestRefused(EndpointError):
    """The server refuses this question for what it says; asking again would not help, and another
    one may pass.
    """
