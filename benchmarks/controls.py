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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.training_loop import TrainingLoop
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.trainer.batches.train_samples import TrainSample

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
        table.add_row(control, *ControlLoop(control, settings).run(steps))
        Console(width=WIDTH).print(table)


class ControlLoop(TrainingLoop):
    """A training loop whose teacher is that of a control."""

    def __init__(self, control: str, settings: Settings) -> None:
        super().__init__(settings)
        self.control = control
        self.random = np.random.default_rng(settings.run.seed)

    def run(self, steps: int) -> list[str]:
        """Train for `steps`; returns the cells of the table."""
        before = self.exact()
        metrics = [self.step() for _ in range(steps)]
        first = metrics[0]
        last = metrics[-1]
        return [
            f"{before:.3f}",
            f"{self.exact():.3f}",
            f"{first['teacher_kl']:.2g}",
            f"{first['grad_norm']:.2g}",
            f"{last['teacher_kl']:.2g}",
        ]

    def arrange(self, samples: list[TrainSample]) -> list[TrainSample]:
        """With `constant` an advantage of −1 and no teacher; with `shuffled` another's scores."""
        if self.control == "constant":
            return [replace(sample, advantage=-1.0) for sample in samples]
        return self.shuffled(samples) if self.control == "shuffled" else samples

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
