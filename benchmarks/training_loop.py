"""Training in one process: the project's own engine, scorers and learner, one after the other.

What it comes to depends on the seed alone, and not on how busy the machine is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.trainer import train_sample
from onstream.pipeline.tasks import Problem, load_scorer, load_task, read_score
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.root import Settings
from onstream.workers.evaluation.greedy import EXACT
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import load_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.maths.scalars import group_advantages

Batch = list[TrainSample]


class TrainingLoop:
    """Generates, scores and learns.

    Each batch is written `ahead` steps before it is trained on, so it is that stale: as all
    rollouts of a run would be whose generators are always `max_off_policy_steps` ahead.
    """

    def __init__(self, settings: Settings, ahead: int = 0) -> None:
        self.settings = settings
        self.ahead = ahead
        self.student = load_student(settings.model.name, settings)
        self.engine = self.student.engine
        self.task = load_task(settings)
        self.scorer = load_scorer(settings)
        self.teacher = load_local(settings)
        self.learner = Learner(settings.model.name, settings.trainer, torch.device("cpu"))
        self._written: deque[Batch] = deque()
        self._batches = 0

    def step(self) -> dict[str, Any]:
        """One step; returns its metrics, and the learner's CPU time as `learner_cpu_ms`."""
        while len(self._written) <= self.ahead:
            self._written.append(self._write())
        started = time.process_time()
        metrics = self.learner.step(self._written.popleft(), self.settings.trainer.max_steps)
        metrics["learner_cpu_ms"] = 1000 * (time.process_time() - started)
        self.engine.load(LoadedPolicy.of(self.learner.steps, self.learner.published_state()))
        return metrics

    def exact(self) -> float:
        """The share of held-out problems that the newest weights answer right, greedily."""
        problems = [self.task.held_out(index) for index in range(self.task.held_out_size)]
        requests = [self._request(key, one, 0.0) for key, one in enumerate(problems)]
        completions = self._complete(requests)
        rewards = [
            self._reward(problem, completion)
            for problem, completion in zip(problems, completions, strict=True)
        ]
        return sum(reward >= EXACT for reward in rewards) / len(rewards)

    def arrange(self, samples: Batch) -> Batch:
        """What is trained on of a batch."""
        return samples

    def _write(self) -> Batch:
        """The next batch, by the newest weights."""
        size = self.settings.orchestrator.group_size
        groups = self.settings.orchestrator.batch_size // size
        first = self._batches * groups
        self._batches += 1
        problems = [self.task.train(first + place // size) for place in range(groups * size)]
        requests = [
            self._request(first * size + place, problem, 1.0)
            for place, problem in enumerate(problems)
        ]
        completions = self._complete(requests)
        to_score = [
            ScoreRequest(request.prompt_ids, completion.token_ids)
            for request, completion in zip(requests, completions, strict=True)
        ]
        scores = self.teacher.score(to_score, top_k=self.settings.trainer.loss.most_top_k)
        samples = [
            train_sample(request, completion, score, group=request.key // size)
            for request, completion, score in zip(requests, completions, scores, strict=True)
        ]
        return self.arrange(self._with_advantages(samples, problems, completions))

    def _request(self, key: int, problem: Problem, temperature: float) -> GenerationRequest:
        return GenerationRequest(
            key,
            self.student.prompt(problem.messages).ids,
            self.settings.inference.sampling.max_completion,
            key * 7919 + self.settings.run.seed,
            temperature,
        )

    def _complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        self.engine.add(list(requests))
        completions: list[Completion] = []
        while self.engine.active:
            completions += self.engine.step()
        return sorted(completions, key=lambda completion: completion.key)

    def _with_advantages(
        self, samples: Batch, problems: Sequence[Problem], completions: Sequence[Completion]
    ) -> Batch:
        """`samples` with the advantages of their rewards, where the loss reads them."""
        loss = self.settings.trainer.loss
        if not loss.needs_reward:
            return samples
        rewards = [self._reward(*pair) for pair in zip(problems, completions, strict=True)]
        size = self.settings.orchestrator.group_size
        advantages: list[float] = []
        for start in range(0, len(rewards), size):
            advantages += group_advantages(rewards[start : start + size])
        return [
            replace(sample, advantage=advantage)
            for sample, advantage in zip(samples, advantages, strict=True)
        ]

    def _reward(self, problem: Problem, completion: Completion) -> float:
        score = self.scorer(self.student.text(completion.token_ids), problem.info)
        return read_score(score)[0]
