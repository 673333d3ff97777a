"""What is compared: three sizes, and the forms in which TRL is tried at each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

BFLOAT16 = ("trainer.dtype=bfloat16", "inference.dtype=bfloat16")
SYNCHRONOUS = ("orchestrator.max_off_policy_steps=0",)
EXAMPLE_OFF_POLICY_STEPS = 2
RATES = (5e-4, 1e-3, 2e-3)
SCHEDULES: tuple[Literal["constant", "cosine"], ...] = ("constant", "cosine")


@dataclass(frozen=True)
class TrlForm:
    """A way to run TRL. `rows` is how many rollouts are in memory at once (a micro-batch).

    `full`: `DistillationTrainer`, the reverse KL over the whole vocabulary. `top-k`: `IWOPDTrainer`
    with the objective `jsd`, the reverse KL over the student's 4 likeliest tokens and all others
    together; TRL has no other top-k form for a teacher in the same process.
    """

    objective: Literal["full", "top-k"] = "full"
    threads: int = 2
    rows: int = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"

    @property
    def speed(self) -> str:
        """What of it decides how fast it is, in words."""
        vocabulary = "full vocabulary" if self.objective == "full" else "top 4 and the rest"
        return f"{vocabulary}, {self.threads} threads, {self.rows} rows, {self.precision}"

    def __str__(self) -> str:
        return f"{self.speed}, lr {self.lr:g} {self.schedule}"


@dataclass(frozen=True)
class Size:
    """A pair, its prompts and its batches. Seconds are those of one run on two idle cores; they
    serve to tell how long the benchmark takes.
    """

    name: str
    title: str
    batch: int
    group: int
    max_completion: int
    forms: tuple[TrlForm, ...]
    sweep_steps: int
    steps: Mapping[str, int]
    """By side: the steps of a run, those that are not timed among them."""
    untimed: int
    """First steps that are not timed, on both sides."""
    seconds: Mapping[str, float]
    """By side, and of a run of the sweep."""
    prompt_tokens: int | None = None
    """None for the shipped pair, whose task makes its prompts."""
    to_goal: bool = False
    """Whether policies are evaluated, so that learning rates and the way to the goal count."""

    @property
    def prompts_a_step(self) -> int:
        return self.batch // self.group

    def sweep_of_rates(self, fastest: Mapping[str, TrlForm]) -> list[TrlForm]:
        """Of each objective its fastest form, at every learning rate and schedule."""
        if not self.to_goal:
            return []
        return [
            replace(form, lr=lr, schedule=schedule)
            for form, lr, schedule in product(fastest.values(), RATES, SCHEDULES)
        ]


EXAMPLE = Size(
    name="a",
    title="the reverse-text example (0.4M under 0.8M, 128 tokens in the vocabulary)",
    batch=128,
    group=2,
    max_completion=16,
    forms=(
        TrlForm(threads=1),
        TrlForm(threads=2),
        TrlForm(threads=2, precision="bfloat16"),
        TrlForm("top-k", threads=1),
        TrlForm("top-k", threads=2),
    ),
    sweep_steps=20,
    steps={"trl": 80, "onstream": 80, "synchronous": 80},
    untimed=5,
    seconds={"sweep": 20, "trl": 45, "onstream": 40, "synchronous": 50},
    to_goal=True,
)
SHORT = Size(
    name="b",
    title="25M under 46M, 65,536 tokens in the vocabulary, prompts of 200, completions of 100",
    batch=64,
    group=8,
    max_completion=100,
    prompt_tokens=200,
    forms=(
        TrlForm(threads=1, rows=64),
        TrlForm(threads=2, rows=64),
        TrlForm(threads=2, rows=16),
        TrlForm(threads=2, rows=64, precision="bfloat16"),
        TrlForm("top-k", threads=2, rows=8),
        TrlForm("top-k", threads=2, rows=8, precision="bfloat16"),
    ),
    sweep_steps=3,
    steps={"trl": 8, "onstream": 29, "bfloat16": 29},
    untimed=2,
    seconds={"sweep": 300, "trl": 520, "onstream": 860, "bfloat16": 700},
)
LONG = replace(
    SHORT,
    name="c",
    title="the same pair, prompts of 1,000, completions of 100",
    prompt_tokens=1000,
    forms=(
        TrlForm(threads=2, rows=64),
        TrlForm(threads=2, rows=16),
        TrlForm(threads=2, rows=16, precision="bfloat16"),
        TrlForm("top-k", threads=2, rows=2),
    ),
    sweep_steps=2,
    steps={"trl": 5, "onstream": 28, "bfloat16": 28},
    seconds={"sweep": 500, "trl": 1250, "onstream": 800, "bfloat16": 700},
    untimed=1,
)
SIZES = {size.name: size for size in (EXAMPLE, SHORT, LONG)}
