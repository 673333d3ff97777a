"""An environment that asks more, and writes down what it hears. Children import it: it is light."""

from __future__ import annotations

import json
from typing import Any

from onstream.pipeline.environments import Started, Stepped
from onstream.pipeline.tasks import Problem
from onstream.pipeline.tasks.base import Message
from tests.workers.environment.games import misbehave


class Questions:
    """Asks `turns` questions in all, each worth its share of 1, the later ones as a tool."""

    def start(self, problem: Problem, seed: int) -> Started:
        misbehave(problem.info.get("start"))
        return Started(problem.messages, {**problem.info, "turn": 0})

    def step(self, state: dict[str, Any], message: Message) -> Stepped:
        misbehave(state.get("step"))
        with open(state["heard"], "a", encoding="utf-8") as heard:
            heard.write(json.dumps(message["content"]) + "\n")
        turn = state["turn"] + 1
        question = {"role": "tool", "content": "Reverse: more"}
        done = turn == state["turns"]
        return Stepped([question], {**state, "turn": turn}, done, reward=1 / state["turns"])
