"""A training step: rollouts/s, tokens/s and peak memory, shared prompts beside padded batches.

    python benchmarks/trainer.py

Three ways take the same step, forward, backward and AdamW, on the same rollouts in groups of 8,
each in a process of its own, on one thread:

- the learner, which computes a group's prompt once, with the top-k form of `rl` and all metrics;
- the same learner on one padded row a rollout, as it is for models whose code cannot share prompts;
- padded batches of 32 under the usual attention mask, all logits, a bare policy gradient: what a
  user of transformers would write.

Mix A is the example's: prompts of about 33 tokens, completions of about 8, the example student's
shape. Mix B is long: prompts of 500, completions of 200, hidden 256 × 4 layers, two groups a step.
Rates are per CPU second of the process, so that a busy machine disturbs them less. Tokens are those
of all rollouts, each with its prompt, however often that was computed. Memory is the peak above
what the process held before its first step (Linux only).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from onstream.settings.sections.losses import RlLoss
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.teacher.scorer import Scores
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from onstream.workers.tiny_models.recipes import RECIPES
from onstream.workers.trainer.learner import Learner, TrainSample

Way = Literal["shared prompts", "padded rows", "plain padded"]
WAYS: tuple[Way, ...] = ("shared prompts", "padded rows", "plain padded")
GROUP_SIZE = 8
TOP_K = 4
PADDED_ROWS = 32
SECONDS = 4.0


@dataclass(frozen=True)
class Mix:
    """What a step is made of; lengths are bounds, both included."""

    name: str
    shape: ModelShape
    groups: int
    prompt: tuple[int, int]
    completion: tuple[int, int]


MIXES = (
    Mix("A", RECIPES["student"].shape, 16, (30, 36), (5, 11)),
    Mix(
        "B",
        ModelShape(
            hidden=256, layers=4, intermediate=768, heads=8, key_value_heads=4, context=1024
        ),
        2,
        (500, 500),
        (150, 250),
    ),
)


@dataclass(frozen=True)
class StepTiming:
    """One way on one mix."""

    steps_per_s: float
    wall_step_s: float
    peak_bytes: int


def main() -> None:
    for mix in MIXES:
        with tempfile.TemporaryDirectory() as scratch:
            model = write_fresh(Path(scratch), mix.shape, seed=0)
            # A process for each way: memory that one way touched would hide in the next one's.
            with ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), max_tasks_per_child=1
            ) as process:
                found = {way: process.submit(measure, mix, way, model).result() for way in WAYS}
        Console().print(table(mix, found))


def table(mix: Mix, found: dict[Way, StepTiming]) -> Table:
    """A line for each way."""
    rollouts = mix.groups * GROUP_SIZE
    tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples(mix))
    drawn = Table(
        f"mix {mix.name}: {rollouts} a step",
        "rollouts/s",
        "tokens/s",
        "× plain",
        "CPU s/step",
        "wall s",
        "peak MiB",
    )
    slowest = found["plain padded"].steps_per_s
    for way, one in found.items():
        rates = (
            f"{one.steps_per_s * rollouts:,.0f}",
            f"{one.steps_per_s * tokens:,.0f}",
            f"{one.steps_per_s / slowest:.1f}",
        )
        drawn.add_row(
            way,
            *rates,
            f"{1 / one.steps_per_s:.3f}",
            f"{one.wall_step_s:.3f}",
            f"{one.peak_bytes / 2**20:,.0f}",
        )
    return drawn


def samples(mix: Mix) -> list[TrainSample]:
    """Random rollouts with a teacher's logprobs."""
    random = np.random.default_rng(0)
    drawn = []
    for group in range(mix.groups):
        prompt_tokens = random.integers(mix.prompt[0], mix.prompt[1] + 1)
        prompt = random.integers(0, 100, prompt_tokens).astype(np.int32)
        for _ in range(GROUP_SIZE):
            tokens = int(random.integers(mix.completion[0], mix.completion[1] + 1))
            drawn.append(sample(random, prompt, tokens, group))
    return drawn


def sample(
    random: np.random.Generator, prompt: npt.NDArray[np.int32], tokens: int, group: int
) -> TrainSample:
    """A random completion of `tokens`, with the logprobs of TOP_K tokens and a tail."""
    bins = np.log(-np.sort(-random.dirichlet(np.ones(TOP_K + 1), tokens))).astype(np.float32)
    completion_ids = random.integers(0, 100, tokens).astype(np.int32)
    top_ids = [random.permutation(100)[:TOP_K] for _ in range(tokens)]
    return TrainSample(
        prompt_ids=prompt,
        completion_ids=completion_ids,
        loss_mask=np.ones(tokens, dtype=np.uint8),
        generator_logprobs=np.full(tokens, -4.8, dtype=np.float32),
        teacher_logprobs=bins[:, 0],
        teacher_top_ids=np.stack(top_ids).astype(np.int32),
        teacher_top_logprobs=bins[:, :TOP_K],
        teacher_tail_logprobs=bins[:, TOP_K],
        advantage=float(random.normal()),
        group=group,
    )


def train_sample(
    request: GenerationRequest, completion: Completion, scores: Scores, *, group: int
) -> TrainSample:
    """A completion and its scores as the trainer gets them."""
    return TrainSample(
        prompt_ids=request.prompt_ids,
        completion_ids=completion.token_ids,
        loss_mask=np.ones(len(completion.token_ids), dtype=np.uint8),
        generator_logprobs=completion.logprobs,
        teacher_logprobs=scores.logprobs,
        teacher_top_ids=scores.top_ids,
        teacher_top_logprobs=scores.top_logprobs,
        teacher_tail_logprobs=scores.tail_logprobs,
        group=group,
    )


def measure(mix: Mix, way: Way, model: Path) -> StepTiming:
    """Steps a CPU second after one unmeasured step, and the memory that it took."""
    torch.set_num_threads(1)  # a second one would spin while it waits, and count as work
    settings = TrainerSettings(
        loss=RlLoss(teacher_tau=1.0, teacher_top_k=TOP_K), optim=OptimSettings(lr=1e-4)
    )
    learner = Learner(model, settings, torch.device("cpu"))
    batch = samples(mix)
    step: Callable[[], object] = partial(learner.step, batch, 1000)
    if way != "shared prompts":
        learner.model.set_attn_implementation("sdpa")
        learner.padded_because = "this is the way without"
    if way == "plain padded":
        step = plain_step(learner, batch)
    before = psutil.Process().memory_info().rss
    reset_peak()
    step()
    peak = peak_rss() - before
    cpu = time.process_time()
    wall = time.perf_counter()
    steps = 0
    while steps < 3 or time.process_time() - cpu < SECONDS:
        step()
        steps += 1
    return StepTiming(
        steps / (time.process_time() - cpu), (time.perf_counter() - wall) / steps, peak
    )


def plain_step(learner: Learner, batch: Sequence[TrainSample]) -> Callable[[], None]:
    """Padded batches through the model's own forward, all logits, a policy gradient and AdamW."""
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-4, fused=True)
    tokens = sum(len(sample.completion_ids) for sample in batch)
    batches = [batch[start : start + PADDED_ROWS] for start in range(0, len(batch), PADDED_ROWS)]

    def loss(part: Sequence[TrainSample]) -> torch.Tensor:
        rows = [
            torch.from_numpy(np.concatenate((sample.prompt_ids, sample.completion_ids))).long()
            for sample in part
        ]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = learner.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        kept = [
            logprobs[row, len(sample.prompt_ids) - 1 : len(rows[row]) - 1].sum() * sample.advantage
            for row, sample in enumerate(part)
        ]
        return -torch.stack(kept).sum() / tokens

    def step() -> None:
        for part in batches:
            loss(part).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def reset_peak() -> None:
    """Make the kernel count this process's peak memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Bytes, since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    main()
