"""Models behind HTTP endpoints: what the external teacher and the generator of chat completions
share.

`EndpointPool` sends questions to whichever `Endpoint` has the fewest in flight, asks again what failed,
leaves alone what keeps failing, and keeps to a rate; `TokenBudget` keeps to a run's tokens; `EventLoopThread`
is the thread that all of it happens in.
"""

from onstream.pipeline.http.endpoint import Endpoint, decoded
from onstream.pipeline.http.endpoint_pool import EndpointPool, EndpointReply
from onstream.pipeline.http.errors import BadReply, EndpointError, EndpointFault, RequestRefused
from onstream.pipeline.http.event_loop import EventLoopThread
from onstream.pipeline.http.served_models import require_model
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
    "decoded",
    "require_model",
]
