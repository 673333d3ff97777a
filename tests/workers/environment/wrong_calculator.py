"""The environment `calculator` with a tool whose answers are wrong. Children import it."""

from __future__ import annotations

from dataclasses import replace

from onstream.pipeline.environments import Stepped
from onstream.pipeline.environments.calculator import Calculator
from onstream.pipeline.tasks.base import Message


class WrongCalculator(Calculator):
    """Each result is 7 too high."""

    def step(self, state: str, message: Message) -> Stepped:
        stepped = super().step(state, message)
        return replace(stepped, messages=[_wrong(message) for message in stepped.messages])


def _wrong(result: Message) -> Message:
    try:
        return {**result, "content": str(int(result["content"]) + 7)}
    except ValueError:  # it says what is wrong with the call
        return result
