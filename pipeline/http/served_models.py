"""Whether an endpoint serves the model that the run needs."""

from __future__ import annotations

from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.http.endpoint import Endpoint
from onstream.pipeline.http.errors import BadReply, EndpointError

NAMES_SHOWN = 5
KEY_REFUSED = (401, 403)


async def require_model(
    endpoint: Endpoint, model: str, section: str, named: str = ""
) -> dict[str, Any]:
    """The entry of `model` in the endpoint's list of models.

    Messages name the endpoint's settings by `section`, and the setting with the model's name by
    `named`, by default `section`.model.name.

    Raises:
        UserError: the endpoint refuses the key, has no list, or does not list the model.
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
    setting = named or f"{section}.model.name"
    raise UserError(
        f"{setting} = {model!r}, which {endpoint.name} does not serve",
        expected=f"one of the models it lists: {names}{more}",
        next_step=f"Correct the name. Where the list is not complete, set "
        f"{section}.client.skip_model_check = true.",
    )


async def _listing(endpoint: Endpoint, section: str) -> Any:
    try:
        return await endpoint.models()
    except EndpointError as error:
        if error.status in KEY_REFUSED:
            raise key_refused(endpoint, error, section) from error
        if not isinstance(error, BadReply) and _may_pass(error.status):
            raise
        raise UserError(
            f"{endpoint.name} has no list of models ({error})",
            expected="an OpenAI-compatible address, which usually ends in /v1",
            next_step=f"Correct {section}.client.base_url, or set "
            f"{section}.client.skip_model_check = true.",
        ) from error


def _may_pass(status: int | None) -> bool:
    """Whether the endpoint may have a list all the same, once its trouble is over."""
    return status is None or status >= 500 or status in (408, 429)


def key_refused(endpoint: Endpoint, error: Exception, section: str) -> UserError:
    """The error for an endpoint that wants another key."""
    variable = "ONSTREAM_" + section.replace(".", "__").upper() + "__CLIENT__API_KEY"
    return UserError(
        f"{endpoint.name} refuses this worker ({error})",
        expected="a key or headers that it accepts",
        next_step=f"Set {section}.client.api_key ({variable}) or {section}.client.headers.",
    )
