"""Makes a small teacher and a weaker student for a task, by supervised training on its ground truth
with the project's own trainer.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import PromptImage, image_urls
from onstream.pipeline.images.vision import Vision
from onstream.pipeline.models.image_features import ImageFeatures
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.prompts import PromptBuilder, render_prompt
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.losses import SftLoss
from onstream.settings.root import Settings
from onstream.settings.trainer import OptimSettings, TrainerSettings
from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.tiny_models.character_tokenizer import CONTEXT_TOKENS, character_tokenizer
from onstream.workers.tiny_models.fresh import write_fresh
from onstream.workers.tiny_models.recipes import Recipe, Role, recipe_of
from onstream.workers.tiny_models.vlm_families import Family, write_fresh_vlm
from onstream.workers.trainer.learner import Learner, TrainSample


@dataclass(frozen=True)
class Made:
    """A model that was made: where it lies, its greedy exact-match share on held-out problems, and
    what it took.
    """

    role: Role
    directory: Path
    exact: float
    parameters: int
    steps: int
    seconds: float


def make(
    task: str, out: Path, seed: int = 0, only: Role | None = None, family: Family = "llava"
) -> list[Made]:
    """Makes `out/teacher` and `out/student`, or `only` one of them: bfloat16 Hugging Face
    directories.

    `family` is that of models that read images, for a task that shows some.

    Raises:
        UserError: the task is unknown or its problems carry no answer to train on; or a model
            missed its goal.
    """
    roles: list[Role] = [only] if only else ["teacher", "student"]
    return [_Maker(task, role, seed, family).run(out / role) for role in roles]


class _Maker:
    """Makes one model, in rounds of training that `recipes` describes."""

    def __init__(self, task: str, role: Role, seed: int, family: Family) -> None:
        self.role = role
        self.recipe = recipe_of(task, role)
        self.seed = seed
        self.family = family
        self.shows_images = bool(
            image_urls(
                load_task(Settings.model_validate({"task": {"name": task}})).train(0).messages
            )
        )
        self.tokenizer = character_tokenizer(images=self.shows_images)
        self.settings = _settings(task, self.recipe, seed, self.tokenizer)
        self.task = load_task(self.settings)
        self.log = get_logger().bind(task=task, model=role)
        self.steps = 0

    def run(self, directory: Path) -> Made:
        """Train until the recipe's goal is met, and save the model to `directory`.

        Raises:
            UserError: the goal was not met in the recipe's rounds.
        """
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="onstream-make-") as scratch:
            share = self._rounds(Path(scratch))
            shutil.copytree(Path(scratch) / "rounded", directory, dirs_exist_ok=True)
        (directory / "model.safetensors").chmod(
            0o644
        )  # safetensors writes for its owner alone; the pair is made to be shared
        made = Made(
            self.role,
            directory,
            share,
            _parameters(directory),
            self.steps,
            time.monotonic() - started,
        )
        self.log.info(
            "made",
            directory=str(directory),
            exact=round(share, 3),
            parameters=made.parameters,
            seconds=round(made.seconds),
        )
        return made

    def _rounds(self, scratch: Path) -> float:
        recipe = self.recipe
        lr = self.recipe.lr
        start = self._fresh(scratch / "fresh")
        for number in range(recipe.max_rounds):
            share = self._round(start, lr, number, scratch)
            if recipe.least <= share <= recipe.most:
                return share
            if share > recipe.most:
                start = scratch / "fresh"
                lr = lr / 2
            else:
                start = scratch / "trained"
        raise UserError(
            f"the {self.role} answers {share:.1%} of the held-out problems of {self.settings.task.name} after {self.steps} steps",
            expected=f"{recipe.least:.1%} to {recipe.most:.1%}",
            next_step="Try another --seed, or change its numbers in workers/tiny_models/recipes.py.",
        )

    def _fresh(self, directory: Path) -> Path:
        if self.shows_images:
            return write_fresh_vlm(directory, self.family, self.recipe.shape, self.seed)
        return write_fresh(directory, self.recipe.shape, self.seed)

    def _round(self, start: Path, lr: float, number: int, scratch: Path) -> float:
        """One round of training from the weights in `start`; returns the share at its last probe."""
        recipe = self.recipe
        learner = Learner(start, _trainer_settings(recipe, lr), torch.device("cpu"))
        share = 0.0
        builder = PromptBuilder(learner.vision, self.settings.images)
        for step in range(1, recipe.round_steps + 1):
            samples, features = self._batch(builder)
            metrics = learner.step(samples, recipe.round_steps, features=features)
            self.steps += 1
            apart = recipe.probe_steps if share < recipe.least / 2 else recipe.fine_probe_steps
            if step % apart and step < recipe.round_steps:
                continue
            share = self._probe(learner, scratch)
            self.log.info(
                "training",
                round=number + 1,
                step=step,
                loss=round(metrics["loss"], 4),
                exact=round(share, 3),
            )
            if share >= recipe.least:
                break
        return share

    def _batch(self, builder: PromptBuilder) -> tuple[list[TrainSample], dict[str, ImageFeatures]]:
        """The next samples, and the images that they show."""
        first = self.steps * self.recipe.batch_size
        made = [
            self._sample(index, builder) for index in range(first, first + self.recipe.batch_size)
        ]
        features = {image.file.digest: image.features for _, images in made for image in images}
        samples = with_mistakes(
            [sample for sample, _ in made],
            self.recipe.mistakes,
            np.random.default_rng([self.seed, self.steps]),
        )
        return samples, features

    def _sample(
        self, index: int, builder: PromptBuilder
    ) -> tuple[TrainSample, tuple[PromptImage, ...]]:
        problem = self.task.train(index)
        messages = self.task.train(index + 1).messages if self.recipe.blind else problem.messages
        prompt = builder.build(
            render_prompt(self.tokenizer, messages), messages, builder.images_of(messages)
        )
        completion = [*self.tokenizer(_answer(problem)).input_ids, self.tokenizer.eos_token_id]
        length = len(completion)
        sample = TrainSample(
            prompt_ids=prompt.ids,
            completion_ids=np.array(completion, dtype=np.int32),
            loss_mask=np.ones(length, dtype=np.uint8),
            generator_logprobs=np.zeros(length, dtype=np.float32),
            group=index,
            images=tuple(prompt.digests),
        )
        return sample, prompt.images

    def _probe(self, learner: Learner, scratch: Path) -> float:
        """The greedy exact-match share of the model as it would be saved: rounded to bfloat16."""
        learner.save_model(scratch / "trained")
        _round_to_bfloat16(
            scratch / "trained", scratch / "rounded", learner.vision or self.tokenizer
        )
        return float(evaluate(scratch / "rounded", self.settings)["exact"])


def with_mistakes(
    samples: Sequence[TrainSample], mean: float, random: np.random.Generator
) -> list[TrainSample]:
    """`samples` with tokens of their completions, the last one apart, replaced by those of other
    answers and left out of the loss.

    The share of a sample is uniform between 0 and 2 · `mean`.
    """
    answers = np.concatenate([sample.completion_ids[:-1] for sample in samples])
    made = []
    for sample in samples:
        length = len(sample.completion_ids)
        wrong = random.random(length) < random.uniform(0, 2 * mean)
        wrong[-1] = False
        read = np.where(wrong, random.choice(answers, length), sample.completion_ids)
        made.append(replace(sample, completion_ids=read, loss_mask=(~wrong).astype(np.uint8)))
    return made


def _trainer_settings(recipe: Recipe, lr: float) -> TrainerSettings:
    optim = OptimSettings(lr=lr, warmup=recipe.warmup_steps, schedule=recipe.schedule)
    return TrainerSettings(
        loss=SftLoss(),
        optim=optim,
        dtype="float32",
        max_steps=recipe.round_steps,
        train_vision=True,
    )


def _settings(task: str, recipe: Recipe, seed: int, tokenizer: PreTrainedTokenizerBase) -> Settings:
    """Settings of an evaluation whose completions have room for twice the longest answer that
    training shows.
    """
    asked: dict[str, Any] = {
        "run": {"seed": seed},
        "task": {"name": task},
        "eval": {"samples": recipe.probe_samples},
        "deployment": {"device": "cpu"},
    }
    known = load_task(Settings.model_validate(asked))
    longest = max(
        len(tokenizer(_answer(known.train(index))).input_ids)
        for index in range(recipe.probe_samples)
    )
    asked["inference"] = {"sampling": {"max_completion": min(2 * longest + 1, CONTEXT_TOKENS // 2)}}
    return Settings.model_validate(asked)


def _answer(problem: Problem) -> str:
    answer = problem.info.get("answer")
    if not isinstance(answer, str):
        raise UserError(
            f"a problem of this task has the answer {answer!r}",
            expected="a text in `answer`, the ground truth to train on",
            next_step="Choose a task whose problems carry their answers, such as reverse-text, alphabet-sort or arithmetic.",
        )
    return answer


def _round_to_bfloat16(
    source: Path, target: Path, reader: Vision | PreTrainedTokenizerBase
) -> None:
    model = load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    model.save_pretrained(target)
    if isinstance(reader, Vision):
        reader.save(target)
    else:
        reader.save_pretrained(
            target
        )  # not the learner's: one that was loaded would also save where from


def _parameters(directory: Path) -> int:
    return sum(weight.numel() for weight in load_file(directory / "model.safetensors").values())
