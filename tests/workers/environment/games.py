"""An environment that does what the problem's `info` says, good or bad."""

from __future__ import annotations

import os
from typing import Any

from onstream.pipeline.environments import Started, Stepped
from onstream.pipeline.tasks import Problem, RolloutError
from onstream.pipeline.tasks.base import Message


def tool(words: str) -> str:
    """Say it back."""
    return words


class Game:
    """Asks on for ever, each turn worth 0.25, or misbehaves."""

    def start(self, problem: Problem, seed: int) -> Any:
        misbehave(problem.info.get("start"))
        if problem.info.get("start") == "wrong type":
            return problem.messages
        return Started(problem.messages, {"info": problem.info, "turn": 0}, [tool])

    def step(self, state: dict[str, Any], message: Message) -> Any:
        misbehave(state["info"].get("step"))
        turn = state["turn"] + 1
        question = {"role": "user", "content": f"{message['content']} and?"}
        if state["info"].get("step") == "wrong type":
            return question
        if state["info"].get("step") == "silence":
            return Stepped([], state)
        if state["info"].get("step") == "speaks for the student":
            return Stepped([{"role": "assistant", "content": "me"}], state)
        if state["info"].get("step") == "hoard":
            state["hoard"] = "x" * 10_000_000
        done = turn == state["info"].get("turns")
        return Stepped([question], {**state, "turn": turn}, done, {"reward": 0.25, "turn": 1.0})


def misbehave(how: str | None) -> None:
    if how == "raise":
        raise KeyError("no such city")
    if how == "exit":
        raise SystemExit(3)
    if how == "die":
        os._exit(9)
    if how == "hang":
        while True:
            pass
    if how == "rollout error":
        raise RolloutError("not allowed")
