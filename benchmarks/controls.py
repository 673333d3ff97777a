"""Is it the teacher that teaches? The example's result beside those of three controls.

    OMP_NUM_THREADS=1 python benchmarks/controls.py [--steps 80] [--seed 0] [--example reverse-text]

A plain synchronous loop of the project's own engine, scorer and learner, in which the teacher can
be exchanged:

- `teacher`: the example as it is;
- `shuffled`: each rollout gets the teacher's scores of another rollout;
- `constant`: no teacher, and an advantage of −1 for every token, which can look like a teacher;
- `itself`: the student as its own teacher. The reverse KL and the gradient of its first step must
  be zero.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.trainer import train_sample
from onstream.pipeline.tasks import load_task
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import load_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner

SCORES = (
    "teacher_logprobs",
    "teacher_top_ids",
    "teacher_top_logprobs",
    "teacher_tail_logprobs",
)
WIDTH = 140  # characters; a file has no width of its own
CONTROLS = {
    "teacher": [],
    "shuffled": [],
    "constant": [
        "trainer.loss.teacher_tau=0",
        "trainer.loss.teacher_top_k=0",
        "trainer.loss.adv_tau=1",
    ],
    "itself": [],
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--example", default="reverse-text", help="a directory of examples/")
    options.add_argument("--steps", type=int, default=80)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    table = Table(
        "control",
        "exact before",
        "exact after",
        "teacher_kl, step 1",
        "gradient norm, step 1",
        "teacher_kl, last step",
    )
    for control, given in CONTROLS.items():
        settings = load_settings(
            [Path("examples") / arguments.example / "onstream.toml"],
            [f"run.seed={arguments.seed}", *given],
        )
        steps = arguments.steps
        if control == "itself":
            steps = 1
            # Without a model of its own, the teacher is the student's starting model.
            no_model = type(settings.teacher_inference)()
            settings = settings.model_copy(update={"teacher_inference": no_model})
        table.add_row(control, *Loop(control, settings).run(steps))
        Console(width=WIDTH).print(table)


class Loop:
    """Generate, score and learn, one step after the other, in one process."""

    def __init__(self, control: str, settings: Settings) -> None:
        self.control = control
        self.settings = settings
        self.student = load_student(settings.model.name, settings)
        self.task = load_task(settings)
        self.scorer = load_local(settings)
        self.engine = self.student.engine
        self.learner = Learner(settings.model.name, settings.trainer, torch.device("cpu"))
        self.random = np.random.default_rng(settings.run.seed)

    def run(self, steps: int) -> list[str]:
        """Train for `steps`; returns the cells of the table."""
        before = evaluate(Path(self.settings.model.name), self.settings)["exact"]
        metrics = [self.step(number) for number in range(steps)]
        with tempfile.TemporaryDirectory() as scratch:
            self.learner.save_model(Path(scratch))
            after = evaluate(Path(scratch), self.settings)["exact"]
        first = metrics[0]
        last = metrics[-1]
        return [
            f"{before:.3f}",
            f"{after:.3f}",
            f"{first['teacher_kl']:.2g}",
            f"{first['grad_norm']:.2g}",
            f"{last['teacher_kl']:.2g}",
        ]

    def step(self, number: int) -> dict[str, float]:
        """One step on rollouts of the newest weights."""
        requests = self.requests(number)
        self.engine.add(list(requests.values()))
        completions: list[Completion] = []
        while self.engine.active:
            completions += self.engine.step()
        completions.sort(key=lambda completion: completion.key)
        to_score = [
            ScoreRequest(requests[completion.key].prompt_ids, completion.token_ids)
            for completion in completions
        ]
        scores = self.scorer.score(to_score, top_k=self.settings.trainer.loss.teacher_top_k)
        samples = [
            self.sample(requests[c.key], c, s) for c, s in zip(completions, scores, strict=True)
        ]
        if self.control == "shuffled":
            samples = self.shuffled(samples)
        metrics = self.learner.step(samples, self.settings.trainer.max_steps)
        self.engine.load(LoadedPolicy.of(number + 1, self.learner.published_state()))
        return metrics

    def requests(self, number: int) -> dict[int, GenerationRequest]:
        """The step's requests by key: a problem for each group, and a request for each member."""
        size = self.settings.orchestrator.group_size
        groups = self.settings.orchestrator.batch_size // size
        requests = {}
        for group in range(number * groups, (number + 1) * groups):
            prompt_ids = self.student.prompt(self.task.train(group).messages).ids
            for key in range(group * size, (group + 1) * size):
                seed = key * 7919 + self.settings.run.seed
                requests[key] = GenerationRequest(
                    key,
                    prompt_ids,
                    self.settings.inference.sampling.max_completion,
                    seed,
                )
        return requests

    def sample(
        self, request: GenerationRequest, completion: Completion, scores: Scores
    ) -> TrainSample:
        """What the learner is given; with `constant` an advantage of −1 and no teacher."""
        group = request.key // self.settings.orchestrator.group_size
        made = train_sample(request, completion, scores, group=group)
        return replace(made, advantage=-1.0) if self.control == "constant" else made

    def shuffled(self, samples: Sequence[TrainSample]) -> list[TrainSample]:
        """Every sample with the scores of another, repeated or cut to its length."""
        shuffled = []
        for sample, place in zip(samples, self.random.permutation(len(samples)), strict=True):
            other = samples[place]
            positions = np.arange(len(sample.completion_ids)) % len(other.completion_ids)
            scores = {name: getattr(other, name)[positions] for name in SCORES}
            shuffled.append(replace(sample, **scores))
        return shuffled


if __name__ == "__main__":
    main()
