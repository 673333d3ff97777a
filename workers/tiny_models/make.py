"""Makes a small teacher and a weaker student for a task, with the project's own trainer.

Both are trained on the ground truth of the task's problems.
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
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.multimodal import ImageFeatures
from onstream.pipeline.prompts import PromptBuilder, render_prompt
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.settings.sections.losses import SftLoss
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.tiny_models.character_tokenizer import CONTEXT_TOKENS, character_tokenizer
from onstream.workers.tiny_models.episodes import RightEpisodes
from onstream.workers.tiny_models.fresh import write_fresh
from onstream.workers.tiny_models.recipes import Recipe, Role, recipe_of
from onstream.workers.tiny_models.vlm_families import VlmFamily, write_fresh_vlm
from onstream.workers.trainer.learner import Learner, TrainSample


@dataclass(frozen=True)
class TinyModel:
    """A model that was made, and what it took."""

    role: Role
    directory: Path
    exact: float  # the greedy exact-match share on held-out problems
    parameters: int
    steps: int
    seconds: float


def make(
    task: str,
    out: Path,
    seed: int = 0,
    only: Role | None = None,
    family: VlmFamily = "llava",
    environment: str | None = None,
) -> list[TinyModel]:
    """Make `out/teacher` and `out/student`, or `only` one of them, in bfloat16.

    For a task that shows images, the models are vision-language models of `family`. With an
    `environment` they play whole episodes.

    Raises:
        UserError: the task is unknown or its problems carry no answer to train on, nobody knows
            right episodes of them, or a model missed its goal.
    """
    roles: list[Role] = [only] if only else ["teacher", "student"]
    recipes = {role: recipe_of(task, role, environment) for role in roles}
    return [
        _TinyModelTraining(task, role, recipe, seed, family).run(out / role)
        for role, recipe in recipes.items()
    ]


class _TinyModelTraining:
    """The making of one model, in rounds of training as its recipe says."""

    def __init__(self, task: str, role: Role, recipe: Recipe, seed: int, family: VlmFamily) -> None:
        self.role = role
        self.recipe = recipe
        self.seed = seed
        self.family = family
        first_problem = load_task(Settings.model_validate({"task": {"name": task}})).train(0)
        self.shows_images = bool(image_urls(first_problem.messages))
        plays = "environment" in recipe.task
        self.tokenizer = character_tokenizer(images=self.shows_images, tools=plays)
        self.settings = _settings(task, recipe, seed, self.tokenizer)
        self.task = load_task(self.settings)
        self.episodes = RightEpisodes(self.settings, self.tokenizer) if plays else None
        self.log = get_logger().bind(task=task, model=role)
        self.steps = 0

    def run(self, directory: Path) -> TinyModel:
        """Train until the recipe's goal is met, and save the model to `directory`.

        Raises:
            UserError: the goal was not met in the recipe's rounds.
        """
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="onstream-make-") as scratch:
            share = self._rounds(Path(scratch))
            shutil.copytree(Path(scratch) / "rounded", directory, dirs_exist_ok=True)
        # safetensors writes files that only their owner reads; the pair is made to be shared.
        (directory / "model.safetensors").chmod(0o644)
        made = TinyModel(
            role=self.role,
            directory=directory,
            exact=share,
            parameters=_parameters(directory),
            steps=self.steps,
            seconds=time.monotonic() - started,
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
        """Rounds until the goal is met; returns the exact-match share of `scratch/rounded`."""
        recipe = self.recipe
        lr = recipe.lr
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
        task = self.settings.task.name
        raise UserError(
            f"the {self.role} answers {share:.1%} of the held-out problems of {task} "
            f"after {self.steps} steps",
            expected=f"{recipe.least:.1%} to {recipe.most:.1%}",
            next_step="Try another --seed, or change the recipe in workers/tiny_models/recipes.py.",
        )

    def _fresh(self, directory: Path) -> Path:
        if self.shows_images:
            return write_fresh_vlm(directory, self.family, self.recipe.shape, self.seed)
        return write_fresh(directory, self.recipe.shape, self.seed, tokenizer=self.tokenizer)

    def _round(self, start: Path, lr: float, number: int, scratch: Path) -> float:
        """One round of training from the weights in `start`; returns the last share measured."""
        recipe = self.recipe
        learner = Learner(start, _trainer_settings(recipe, lr), torch.device("cpu"))
        share = 0.0
        builder = PromptBuilder(learner.vision, self.settings.images)
        for step in range(1, recipe.round_steps + 1):
            samples, features = self._batch(builder, learner.tokenizer)
            metrics = learner.step(samples, recipe.round_steps, features=features)
            self.steps += 1
            near = share >= recipe.least / 2
            interval = recipe.fine_eval_interval if near else recipe.eval_interval
            if step % interval and step < recipe.round_steps:
                continue
            share = self._exact_share(learner, scratch)
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

    def _batch(
        self, builder: PromptBuilder, tokenizer: Any
    ) -> tuple[list[TrainSample], dict[str, ImageFeatures]]:
        """The next samples, and the images that they show."""
        first = self.steps * self.recipe.batch_size
        samples = []
        features = {}
        for index in range(first, first + self.recipe.batch_size):
            sample, images = self._sample(index, builder, tokenizer)
            samples.append(sample)
            features.update({image.file.digest: image.features for image in images})
        random = np.random.default_rng([self.seed, self.steps])
        end = self.tokenizer.eos_token_id
        return with_mistakes(samples, self.recipe.mistakes, random, end=end), features

    def _sample(
        self, index: int, builder: PromptBuilder, tokenizer: Any
    ) -> tuple[TrainSample, tuple[PromptImage, ...]]:
        """The problem `index` with its right answer, and the images that it shows."""
        problem = self.task.train(index)
        if self.episodes is not None:
            return self.episodes.sample(problem, index), ()
        messages = self.task.train(index + 1).messages if self.recipe.blind else problem.messages
        text = render_prompt(tokenizer, messages, {})  # by the template of the model's family
        prompt = builder.build(text, messages, builder.images_of(messages))
        completion = [*tokenizer(_answer(problem)).input_ids, tokenizer.eos_token_id]
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

    def _exact_share(self, learner: Learner, scratch: Path) -> float:
        """The greedy exact-match share of the model as it would be saved: rounded to bfloat16."""
        learner.save_model(scratch / "trained")
        # The learner's tokenizer was loaded, and would save the path that it was loaded from.
        reader = learner.vision or self.tokenizer
        _round_to_bfloat16(scratch / "trained", scratch / "rounded", reader)
        return float(evaluate(scratch / "rounded", self.settings)["exact"])


def with_mistakes(
    samples: Sequence[TrainSample], mean: float, random: np.random.Generator, *, end: int
) -> list[TrainSample]:
    """`samples` with some of the tokens in the loss replaced by those of other answers.

    The replaced tokens are left out of the loss. The token `end`, which ends a turn, stays. The
    share that is replaced is drawn for each sample, uniformly from 0 to 2 · `mean`.
    """
    replaceable = [(one.loss_mask == 1) & (one.completion_ids != end) for one in samples]
    answers = np.concatenate(
        [one.completion_ids[which] for one, which in zip(samples, replaceable, strict=True)]
    )
    made = []
    for sample, may_be_wrong in zip(samples, replaceable, strict=True):
        length = len(sample.completion_ids)
        wrong = random.random(length) < random.uniform(0, 2 * mean)
        wrong &= may_be_wrong
        read = np.where(wrong, random.choice(answers, length), sample.completion_ids)
        made.append(replace(sample, completion_ids=read, loss_mask=sample.loss_mask * ~wrong))
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
    """Settings of an evaluation, with room for twice the longest answer that training shows, or
    as much as the recipe says.
    """
    values: dict[str, Any] = {
        "run": {"seed": seed},
        "task": {"name": task, **recipe.task},
        "eval": {"samples": recipe.eval_samples},
        "deployment": {"device": "cpu"},
    }
    if recipe.max_completion is not None:
        values["inference"] = {"sampling": {"max_completion": recipe.max_completion}}
        return Settings.model_validate(values)
    problems = load_task(Settings.model_validate(values))
    answers = [_answer(problems.train(index)) for index in range(recipe.eval_samples)]
    longest = max(len(tokenizer(answer).input_ids) for answer in answers)
    room = min(2 * longest + 1, CONTEXT_TOKENS // 2)
    values["inference"] = {"sampling": {"max_completion": room}}
    return Settings.model_validate(values)


def _answer(problem: Problem) -> str:
    answer = problem.info.get("answer")
    if not isinstance(answer, str):
        raise UserError(
            f"a problem of this task has the answer {answer!r}",
            expected="a text in `answer`, the ground truth to train on",
            next_step="Choose a task whose problems carry their answers, such as reverse-text, "
            "alphabet-sort or arithmetic.",
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
        reader.save_pretrained(target)


def _parameters(directory: Path) -> int:
    return sum(weight.numel() for weight in load_file(directory / "model.safetensors").values())
