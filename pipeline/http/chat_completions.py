"""Chat completions of an OpenAI-compatible endpoint, and what is read of its answers.

Servers add fields of their own, such as a message's reasoning, so that answers stay plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from onstream.pipeline.http.endpoint import Endpoint, decoded


def chat_request(body: dict[str, Any]) -> Callable[[Endpoint], Coroutine[Any, Any, Any]]:
    """A function that asks an endpoint for the completions of `body`; its answer, decoded."""

    async def ask(endpoint: Endpoint) -> Any:
        return decoded(await endpoint.post("/v1/chat/completions", body))

    return ask


def choices_of(answer: Any) -> list[dict[str, Any]]:
    """The choices of an answer that have a message."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return [
        choice
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and isinstance(choice.get("message"), dict)
    ]


def total_tokens(answer: Any) -> int:
    """The tokens that were read and written, by the answer's own count; 0 without one."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0
