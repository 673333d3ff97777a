"""The environment `sort-turns`: after a first answer, more letters to sort in with it."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

import msgspec

from onstream.pipeline.environments.base import Started, Stepped
from onstream.pipeline.tasks.base import Message, Problem
from onstream.pipeline.tasks.scorers import match_answer

MORE_TURNS = 2
MOST_LETTERS = 3


class Letters(msgspec.Struct, frozen=True):
    """The right answer to the last question, and the letters that are still to be asked."""

    answer: str
    more: list[str]


class SortTurns:
    """The problem is one of `alphabet-sort`; each turn's answer is worth its share of 1."""

    def start(self, problem: Problem, seed: int) -> Started:
        """As in the protocol."""
        random = Random(seed)
        more = [
            "".join(random.choices(ascii_lowercase, k=random.randint(1, MOST_LETTERS)))
            for _ in range(MORE_TURNS)
        ]
        return Started(problem.messages, Letters(str(problem.info["answer"]), more))

    def step(self, state: Letters, message: Message) -> Stepped:
        """As in the protocol."""
        score = match_answer(message["content"], {"answer": state.answer})
        parts = {name: value / (1 + MORE_TURNS) for name, value in score.items()}
        if not state.more:
            return Stepped(state=state, done=True, reward=parts)
        letters, *rest = state.more
        answer = "".join(sorted(state.answer + letters))
        question = {"role": "user", "content": f"Add: {letters}"}
        return Stepped([question], Letters(answer, rest), reward=parts)
