"""Models behind HTTP endpoints: what the external teacher and the generator of chat completions share.

`Pool` sends questions to whichever `Endpoint` has the fewest in flight, asks again what failed, leaves alone what keeps
failing, and keeps to a rate; `Budget` keeps to a run's tokens; `Background` is the thread that all of it happens in.
"""

from pipeline.http.background import Background
from pipeline.http.budget import Budget
from pipeline.http.endpoint import Endpoint, decoded
from pipeline.http.faults import BadReply, EndpointError, EndpointFault, Refused
from pipeline.http.models import require_model
from pipeline.http.pool import Answered, Pool

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
