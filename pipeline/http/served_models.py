"""Whether an endpoint serves the model that a run wants of it."""

from __future__ import annotations

from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.http.endpoint import Endpoint
from onstream.pipeline.http.errors import BadReply, EndpointError

NAMES_SHOWN = 5
LOCKED = (401, 403)


async def require_model(
    endpoint: Endpoint, model: str, section: str, named: str = ""
) -> dict[str, Any]:
    """The entry of `model` in the endpoint's list. `section` holds the settings of the endpoint,
    and `named` the model's name, by default its `model.name`, for messages.

    Raises:
        UserError: it lets nobody in with this key, has no list, or does not list the model.
        EndpointFault: it did not answer.
    """
    listing = await _listing(endpoint, section)
    entries = listing.get("data") if isinstance(listing, dict) else None
    models = {
        entry["id"]: entry for entry in entries or () if isinstance(entry, dict) and "id" in entry
    }
    if model in models:
        return dict(models[model])
    names = ", ".join(repr(name) for name in list(models)[:NAMES_SHOWN]) or "none"
    more = f" and {len(models) - NAMES_SHOWN} more" if len(models) > NAMES_SHOWN else ""
    raise UserError(
        f"{named or f'{section}.model.name'} = {model!r}, which {endpoint.name} does not serve",
        expected=f"one of the models it lists: {names}{more}",
        next_step=f"Correct the name, or set {section}.client.skip_model_check = true where the list is not complete.",
    )


async def _listing(endpoint: Endpoint, section: str) -> Any:
    try:
        return await endpoint.models()
    except EndpointError as error:
        if error.status in LOCKED:
            raise locked(endpoint, error, section) from error
        if not isinstance(error, BadReply) and (
            error.status is None or error.status >= 500 or error.status in (408, 429)
        ):
            raise
        raise UserError(
            f"{endpoint.name} has no list of models ({error})",
            expected="an OpenAI-compatible address, which usually ends in /v1",
            next_step=f"Correct {section}.client.base_url, or set {section}.client.skip_model_check = true.",
        ) from error


def locked(endpoint: Endpoint, error: Exception, section: str) -> UserError:
    """The endpoint wants another key."""
    variable = "ONSTREAM_" + section.replace(".", "__").upper() + "__CLIENT__API_KEY"
    return UserError(
        f"{endpoint.name} refuses this worker ({error})",
        expected="a key or headers that it accepts",
        next_step=f"Set {section}.client.api_key ({variable}) or {section}.client.headers.",
    )
