"""What can be wrong with a reply: the server, or what it was asked."""

from __future__ import annotations


class EndpointFault(Exception):
    """The endpoint did not do its work, through no fault of the sample: worth asking again, here or elsewhere.

    `status` is the reply's HTTP status, None where there was none. `retry_after_s` is how long the server asked to be
    left alone. `breaks` is False for a server that is only busy: it does not count towards its circuit breaker.
    """

    def __init__(self, words: str, *, status: int | None = None, retry_after_s: float | None = None, breaks: bool = True) -> None:
        super().__init__(words)
        self.status, self.retry_after_s, self.breaks = status, retry_after_s, breaks


class BadReply(EndpointFault):
    """A reply with status 200 that is not what was asked for."""


class Refused(Exception):
    """The server refuses this sample; asking again would not help. `status` is the reply's, None where it is our own verdict."""

    def __init__(self, words: str, *, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status
