"""Models behind HTTP endpoints, for external teachers and for generators that use servers.

`EndpointPool` sends each request to the `Endpoint` with the fewest in flight, sends again what
failed, takes out an endpoint that keeps failing, and keeps to a rate. `TokenBudget` bounds the
tokens of a run. `chat_request` asks for chat completions. `EventLoopThread` is the thread that all
of this runs in.
"""

from onstream.pipeline.http.chat_completions import chat_request, choices_of, total_tokens
from onstream.pipeline.http.endpoint import (
    BadReply,
    Endpoint,
    EndpointError,
    EndpointFault,
    RequestRefused,
    decoded,
    require_model,
)
from onstream.pipeline.http.endpoint_pool import EndpointPool, EndpointReply
from onstream.pipeline.http.event_loop import EventLoopThread
from onstream.pipeline.http.token_budget import TokenBudget

__all__ = [
    "BadReply",
    "Endpoint",
    "EndpointError",
    "EndpointFault",
    "EndpointPool",
    "EndpointReply",
    "EventLoopThread",
    "RequestRefused",
    "TokenBudget",
    "chat_request",
    "choices_of",
    "decoded",
    "require_model",
    "total_tokens",
]
