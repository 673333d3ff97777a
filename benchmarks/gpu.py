"""Never run on a GPU. Real sizes on one GPU: trainer, teacher, publication and a whole step.

`make bench-gpu` runs it: random weights of the shapes of Qwen3-0.6B and Qwen3-4B, less than five
minutes on an H100, no network, no vLLM. `--tiny` runs all of it with tiny shapes on the CPU, where
its figures mean nothing.

Each row stands beside what it compares with: what prime-rl published for one H100 at 16k tokens,
or the goal. A step of the trainer is forward, backward and AdamW in bfloat16 with the top-k form of
`rl`; tokens are those of whole samples. MFU counts the arithmetic that a step needs, not what is
computed anew: 6 operations a weight and token, 4 where the weights are frozen, and attention.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from benchmarks.publication import Directory
from benchmarks.trainer import sample, train_sample
from onstream.settings.extras import installed
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import load_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from onstream.workers.tiny_models.fresh import save_fresh
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 operations a second, by a part of the card's name."""
LORA = {"rank": 16, "alpha": 32}
TOP_K = 16
REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model with tied embeddings."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied by."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_dim * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden

    def train_flops(self, tokens: int, *, frozen: bool) -> float:
        """Operations for each token of a sequence of `tokens`, forward and backward."""
        multiplied = (4 if frozen else 6) * self.matrix_weights
        return multiplied + 6 * self.layers * self.heads * self.head_dim * tokens


@dataclass(frozen=True)
class Sizes:
    """What is measured: the models, and the lengths of samples in tokens."""

    student: Shape
    teacher: Shape
    short: int
    long: int
    samples: int
    rollouts: int
    written: int


REAL = Sizes(
    student=Shape(1024, 28, 3072, 16, 8, 128, 151936),
    teacher=Shape(2560, 36, 9728, 32, 8, 128, 151936),
    short=2048,
    long=16384,
    samples=16,
    rollouts=64,
    written=256,
)
TINY = Sizes(
    student=Shape(64, 2, 128, 4, 2, 32, 256),
    teacher=Shape(96, 2, 128, 4, 2, 32, 256),
    short=48,
    long=96,
    samples=4,
    rollouts=4,
    written=8,
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    beside: str
    mfu: str = ""
    peak: str = ""


@dataclass(frozen=True)
class Place:
    """Where it is measured: the device, and the directories of the two models."""

    device: torch.device
    student: Path
    teacher: Path
    sizes: Sizes

    @property
    def card(self) -> str:
        """The name of what computes."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return "a CPU: these figures mean nothing"

    def settings(self, attention: str = "auto") -> Settings:
        """A run of both models on this device; `attention` is how the teacher's rows are read."""
        return Settings.model_validate(
            {
                "model": {"name": str(self.student)},
                "deployment": {"device": self.device.type},
                "inference": {"engine": "transformers", "dtype": "bfloat16"},
                "teacher_inference": {
                    "engine": "transformers",
                    "dtype": "bfloat16",
                    "model": {"name": str(self.teacher)},
                    "attention": attention,
                },
            }
        )

    def learner(self, model: Path, *, recompute: bool, **given: Any) -> Learner:
        """The trainer of `model` in bfloat16."""
        trainer = {
            "dtype": "bfloat16",
            "loss": {"teacher_tau": 1.0, "teacher_top_k": 4},
            "optim": {"lr": 1e-5, "warmup": 0},
            **given,
        }
        settings = TrainerSettings.model_validate(trainer)
        return Learner(model, settings, self.device, recompute=recompute)

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of a few times, after one that is not measured."""
        work()
        return statistics.median(self.once(work) for _ in range(REPEATS))

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of `work`, with all that it began on the device."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until the device has done all that was begun."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back the memory of what is gone, and begin to watch the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        """The most memory that was in use since `free`, in GiB."""
        if self.device.type != "cuda":
            return "–"
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"

    def mfu(self, flops: float) -> str:
        """`flops` a second as a share of what the card can."""
        for part, most in PEAK_FLOPS.items():
            if self.device.type == "cuda" and part in self.card:
                return f"{flops / most:.1%}"
        return "–"


def write_model(directory: Path, shape: Shape, device: torch.device) -> Path:
    """Random weights of `shape` in bfloat16, drawn on `device`."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return save_fresh(directory, config, seed=0)
    finally:
        torch.set_default_dtype(before)


def alone(count: int, tokens: int) -> list[TrainSample]:
    """Samples of `tokens`, an eighth of them a prompt of its own."""
    random = np.random.default_rng(0)
    prompt = tokens // 8
    return [
        sample(random, random.integers(8, 100, prompt).astype(np.int32), tokens - prompt, group)
        for group in range(count)
    ]


def training(
    place: Place, name: str, model: Path, shape: Shape, tokens: int, beside: str, **given: Any
) -> Row:
    """Steps over two rows of `microbatch` tokens, or two samples where they are longer."""
    learner = place.learner(model, recompute=tokens == place.sizes.long, **given)
    place.free()  # a frozen base is read in float32 first
    batch = alone(max(2, 2 * learner.trainer.microbatch // tokens), tokens)
    if place.sizes is TINY:
        batch = batch[:2]
    seconds = place.seconds(lambda: learner.step(batch, 1000))
    rate = len(batch) * tokens / seconds
    flops = shape.train_flops(tokens, frozen="lora" in given)
    return Row(name, f"{rate:,.0f} tokens/s", beside, place.mfu(rate * flops), place.peak())


def trainer_rows(place: Place) -> Iterator[Row]:
    """Full steps of the student, and steps of an adapter on the teacher's shape."""
    sizes = place.sizes
    yield training(
        place,
        f"trainer, 0.6B full, {sizes.short} tokens",
        place.student,
        sizes.student,
        sizes.short,
        "no figure published",
    )
    yield training(
        place,
        f"trainer, 0.6B full, {sizes.long} tokens, layers recomputed",
        place.student,
        sizes.student,
        sizes.long,
        "prime-rl 11,900 tokens/s, 11.1 %, 12.5 GiB; goal 30,000 in 12.5 GiB",
    )
    yield training(
        place,
        "the same, AdamW's moments in the host's memory",
        place.student,
        sizes.student,
        sizes.long,
        "the row above",
        optim={"lr": 1e-5, "warmup": 0, "states": "host"},
    )
    if installed("bitsandbytes"):
        yield training(
            place,
            "the same, AdamW's moments in 8 bits",
            place.student,
            sizes.student,
            sizes.long,
            "the rows above",
            optim={"lr": 1e-5, "warmup": 0, "states": "8bit"},
        )
    yield training(
        place,
        f"trainer, 4B LoRA 16, {sizes.long} tokens, layers recomputed",
        place.teacher,
        sizes.teacher,
        sizes.long,
        "prime-rl 6,230 tokens/s, 21.7 %, 23.3 GiB; goal 11,000",
        lora=LORA,
    )


def teacher_row(place: Place, attention: str, beside: str) -> Row:
    """Scores of the teacher: logprobs, the likeliest tokens and the tail."""
    place.free()
    sizes = place.sizes
    requests = [
        ScoreRequest(one.prompt_ids, one.completion_ids)
        for one in alone(sizes.samples, sizes.short)
    ]
    with closing(load_local(place.settings(attention))) as scorer:
        seconds = place.seconds(lambda: scorer.score(requests, top_k=TOP_K))
    positions = sum(len(request.completion_ids) for request in requests)
    return Row(
        f"teacher, 4B, top {TOP_K} and tail, samples of {sizes.short} tokens, by {attention}",
        f"{positions / seconds:,.0f} positions/s",
        beside,
        peak=place.peak(),
    )


def publication_row(place: Place, scratch: Path) -> Row:
    """The student's weights from the device into files with a digest, as the trainer does it."""
    place.free()
    learner = place.learner(place.student, recompute=False)
    path = scratch / "publication"
    path.mkdir()
    directory = Directory(path)
    taken: list[float] = []

    def publish() -> None:
        started = time.perf_counter()
        directory.as_it_is(
            learner.live_state(), lambda: taken.append(time.perf_counter() - started)
        )

    before = place.seconds(lambda: directory.as_it_was(learner.live_state()))
    seconds = place.seconds(publish)
    held = statistics.median(taken[1:])
    return Row(
        "publication of 0.6B in bfloat16: the trainer's time, and until it is written",
        f"{held:.2f} s, {seconds:.2f} s",
        f"as it was {before:.2f} s, all of it the trainer's; goal 1 s",
    )


def whole_step_row(place: Place) -> Row:
    """A step of the student under the teacher, one stage after the other."""
    place.free()
    sizes = place.sizes
    random = np.random.default_rng(0)
    prompts = [random.integers(8, 100, 32).astype(np.int32) for _ in range(sizes.rollouts // 4)]
    asked = [
        GenerationRequest(key, prompts[key // 4], max_tokens=sizes.written, seed=key)
        for key in range(sizes.rollouts)
    ]
    engine = load_student(str(place.student), place.settings()).engine
    scorer = load_local(place.settings())
    learner = place.learner(place.student, recompute=False)
    with closing(engine), closing(scorer):
        one_step(place, engine, scorer, learner, asked)  # not reported: the first of all
        last = one_step(place, engine, scorer, learner, asked)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in last.items())
    return Row(
        f"whole step 0.6B ← 4B: {sizes.rollouts} rollouts of {sizes.written} tokens",
        f"{sum(last.values()):.2f} s",
        parts,
        peak=place.peak(),
    )


def one_step(
    place: Place, engine: Any, scorer: Any, learner: Learner, asked: Sequence[GenerationRequest]
) -> dict[str, float]:
    """Seconds of each stage of a step over `asked`."""
    written: dict[int, Completion] = {}
    generate = place.once(lambda: write(engine, asked, written))
    rollouts = [(one, written[one.key]) for one in asked]
    requests = [ScoreRequest(one.prompt_ids, other.token_ids) for one, other in rollouts]
    scored: list[Scores] = []
    score = place.once(lambda: scored.extend(scorer.score(requests, top_k=4)))
    batch = trained(rollouts, scored)
    train = place.once(lambda: learner.step(batch, 1000))
    return {"generate": generate, "score": score, "train": train}


def write(engine: Any, asked: Sequence[GenerationRequest], written: dict[int, Completion]) -> None:
    """All completions of `asked`, by key."""
    engine.add(asked)
    while engine.active:
        written |= {one.key: one for one in engine.step()}


def trained(
    rollouts: Sequence[tuple[GenerationRequest, Completion]], scored: Sequence[Scores]
) -> list[TrainSample]:
    """Rollouts and their scores as the trainer gets them."""
    return [
        train_sample(request, completion, scores, group=request.key // 4)
        for (request, completion), scores in zip(rollouts, scored, strict=True)
    ]


def rows(place: Place, scratch: Path) -> Iterator[Row]:
    """Every row of the table."""
    yield from trainer_rows(place)
    yield teacher_row(place, "varlen", "goal 60,000")
    yield teacher_row(place, "sdpa", "the row above")
    yield publication_row(place, scratch)
    yield whole_step_row(place)


def measured(device: torch.device, sizes: Sizes, console: Console) -> None:
    """Print the table, and each row as soon as it is known."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        student = write_model(scratch / "student", sizes.student, device)
        teacher = write_model(scratch / "teacher", sizes.teacher, device)
        place = Place(device, student, teacher, sizes)
        table = Table(place.card, "Onstream", "MFU", "peak GiB", "beside")
        for row in rows(place, scratch):
            console.print(f"{row.what}: {row.figure}")
            table.add_row(row.what, row.figure, row.mfu, row.peak, row.beside)
        console.print(table)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU")
    asked = options.parse_args()
    if not asked.tiny and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --tiny runs all of it with tiny shapes on the CPU")
    console = Console(width=180)
    started = time.perf_counter()
    if asked.tiny:
        measured(torch.device("cpu"), TINY, console)
    else:
        measured(torch.device("cuda"), REAL, console)
    console.print(f"in {time.perf_counter() - started:.0f} s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
