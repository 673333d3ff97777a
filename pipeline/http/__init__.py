"""Models behind HTTP endpoints: what the external teacher and the generator of chat completions
share.

`Pool` sends questions to whichever `Endpoint` has the fewest in flight, asks again what failed,
leaves alone what keeps failing, and keeps to a rate; `Budget` keeps to a run's tokens; `Background`
is the thread that all of it happens in.
"""

from onstream.pipeline.http.endpoint import Endpoint, decoded
from onstream.pipeline.http.endpoint_pool import Answered, Pool
from onstream.pipeline.http.errors import BadReply, EndpointError, EndpointFault, Refused
from onstream.pipeline.http.event_loop import Background
from onstream.pipeline.http.served_models import require_model
from onstream.pipeline.http.token_budget import Budget

__all__ = [
    "Answered",
    "Background",
    "BadReply",
    "Budget",
    "Endpoint",
    "EndpointError",
    "EndpointFault",
    "Pool",
    "Refused",
    "decoded",
    "require_model",
]
