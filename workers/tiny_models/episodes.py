"""Right episodes to train on, which one plays who knows how."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from onstream.pipeline.environments import load_environment
from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import ids_array, logprobs_array, mask_array
from onstream.pipeline.records import Episode, Ids, Rollout, Sample, Ticket
from onstream.pipeline.tasks import Problem
from onstream.pipeline.tasks.base import Message
from onstream.settings.root import Settings
from onstream.workers.environment.episodes import (
    after_step,
    begun,
    episode_seed,
    start_request,
    step_request,
)
from onstream.workers.environment.player import EnvironmentPlayer
from onstream.workers.generator.conversation import Conversation
from onstream.workers.generator.engines.base import Completion
from onstream.workers.generator.episode_turns import EpisodeTurns, Turn
from onstream.workers.tiny_models.character_tokenizer import CONTEXT_TOKENS
from onstream.workers.trainer.learner import TrainSample

_TERM = re.compile(r"[+-]?\d+")


class RightEpisodes:
    """Episodes in `task.environment`, the student's part played by `next_turn`."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._seed = settings.run.seed
        self._max_turns = settings.task.max_turns
        self._tokenizer = tokenizer
        self._player = EnvironmentPlayer(load_environment(settings))
        self._turns = EpisodeTurns(
            Conversation(tokenizer, {}),
            max_context=lambda: CONTEXT_TOKENS,
            max_completion=settings.inference.sampling.max_completion,
            max_episode=settings.task.max_episode,
            text=self._text,
        )

    def sample(self, problem: Problem, index: int) -> TrainSample:
        """The episode on `problem`, number `index` of the task, to train on.

        Raises:
            UserError: it does not end with a reward of 1.
        """
        started = self._player.answer(start_request(problem, episode_seed(self._seed, index)))
        ticket = Ticket(index + 1, index, 1, index, 0, 0, ["act", "train"])
        record: Episode | Rollout = begun(ticket, problem.info, started, temperature=1.0)
        while isinstance(record, Episode):
            written = self._with_next_turn(record)
            played = self._player.answer(step_request(written))
            record = after_step(written, played, self._max_turns)
        if record.reward != 1:
            question = problem.messages[-1]["content"]
            raise UserError(
                f"an episode on {question!r} ends with the reward {record.reward}",
                expected="1, since it is played right",
                next_step="Look at next_turn in workers/tiny_models/episodes.py.",
            )
        return _train_sample(record.samples[-1], index)

    def _with_next_turn(self, episode: Episode) -> Episode:
        turn = self._turns.next(episode)
        assert isinstance(turn, Turn), turn
        ids = self._tokenizer(next_turn(episode.messages)).input_ids
        written = np.array([*ids, self._tokenizer.eos_token_id], dtype=np.int32)
        completion = Completion(0, written, np.zeros(len(written), np.float32), "stop", [])
        return self._turns.after(turn, completion)

    def _text(self, ids: Ids) -> str:
        return str(self._tokenizer.decode(ids[:-1].tolist()))


def next_turn(messages: Sequence[Message]) -> str:
    """What to say next where a sum is asked for: a call for each operation, then the last result.

    >>> next_turn([{"role": "user", "content": "Compute: 1+2-3"}])
    '<tool_call>{"name": "calculate", "arguments": {"expression": "1+2"}}</tool_call>'
    """
    question = next(message["content"] for message in messages if message["role"] == "user")
    results = [message["content"] for message in messages if message["role"] == "tool"]
    first, *others = _TERM.findall(question)
    if len(results) == len(others):
        return str(results[-1])
    expression = (results[-1] if results else first) + others[len(results)]
    call = {"name": "calculate", "arguments": {"expression": expression}}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


def _train_sample(sample: Sample, index: int) -> TrainSample:
    return TrainSample(
        prompt_ids=ids_array(sample.prompt_ids),
        completion_ids=ids_array(sample.completion_ids),
        loss_mask=mask_array(sample.loss_mask),
        generator_logprobs=logprobs_array(sample.generator_logprobs),
        group=index,
    )
