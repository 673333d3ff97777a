"""What the matrix products of a rollout take alone, at the sizes of `make bench-peers`.

    python -m benchmarks.peers.products [--only a|b|c ...]

On one thread: layers and output layers as plain products of random matrices, no attention, nothing
elementwise and no Python around them. It is the share of a stage's time that only fewer or cheaper
products could save. Prompts count once a group, as the trainer, the teacher and the built-in
generator compute them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmarks.peers.pairs import EXAMPLE
from benchmarks.peers.sizes import SIZES, Size
from onstream.workers.generator.engines.transformers.decoder_choice import ENOUGH_ON_CPU

MADE_PAIR = Path("runs/peers/pair")
EXAMPLE_TOKENS = (27, 8)
"""Mean tokens of a prompt and of a completion at size a."""
ROWS = 1024
REPEATS = 5
DTYPES = (torch.float32, torch.bfloat16)
CORES = 2
WIDTH = 110  # characters; a file has no width of its own


@dataclass(frozen=True)
class Products:
    """The weights of a model: [inner, outer] of each product and how often it comes."""

    layers: list[tuple[int, int, int]]
    output: tuple[int, int]

    @classmethod
    def of(cls, directory: Path) -> Products:
        """Those of the Qwen3 model in `directory`."""
        config = AutoConfig.from_pretrained(directory)
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        count = config.num_hidden_layers
        return cls(
            layers=[
                (hidden, queries, count),
                (hidden, keys, 2 * count),
                (queries, hidden, count),
                (hidden, inner, 2 * count),
                (inner, hidden, count),
            ],
            output=(hidden, config.vocab_size),
        )


@dataclass(frozen=True)
class Tokens:
    """What a step of a size reads and writes."""

    prompts: int
    completions: int
    at_once: int
    """Completions that the generator decodes together."""
    rollouts: int


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    asked = options.parse_args()
    torch.set_num_threads(1)
    table = Table("size", "products of", *(f"{_name(dtype)}, ms a rollout" for dtype in DTYPES))
    for name in asked.only:
        add_rows(table, SIZES[name])
    Console(width=WIDTH).print(table)


def add_rows(table: Table, size: Size) -> None:
    """A row for each stage, and one for all."""
    pair = MADE_PAIR if size.prompt_tokens else EXAMPLE
    student, teacher = Products.of(pair / "student"), Products.of(pair / "teacher")
    tokens = tokens_of(size)
    stages: dict[str, Callable[[torch.dtype], float]] = {
        "trainer": lambda dtype: training_s(student, tokens, dtype),
        "teacher": lambda dtype: reading_s(teacher, tokens, dtype),
        "generator": lambda dtype: writing_s(student, tokens, dtype),
    }
    totals = dict.fromkeys(DTYPES, 0.0)
    for stage, seconds in stages.items():
        cells = []
        for dtype in DTYPES:
            taken = seconds(dtype) / tokens.rollouts
            totals[dtype] += taken
            cells.append(f"{1000 * taken:.3g}")
        table.add_row(size.name, stage, *cells)
    most = [
        f"{1000 * s:.3g}: {CORES / s:,.3g} rollouts/s on {CORES} cores" for s in totals.values()
    ]
    table.add_row(size.name, "all", *most, end_section=True)


def tokens_of(size: Size) -> Tokens:
    """A step's tokens; each prompt once."""
    prompt, completion = EXAMPLE_TOKENS
    if size.prompt_tokens is not None:
        prompt, completion = size.prompt_tokens, size.max_completion
    return Tokens(
        prompts=size.prompts_a_step * prompt,
        completions=size.batch * completion,
        at_once=max(ENOUGH_ON_CPU, size.batch),
        rollouts=size.batch,
    )


def training_s(student: Products, tokens: Tokens, dtype: torch.dtype) -> float:
    """A trainer's step: forwards, and both products of each backward."""
    rows = tokens.prompts + tokens.completions
    seconds = sum(
        count * _forward_and_backward_s(rows, inner, outer, dtype)
        for inner, outer, count in student.layers
    )
    return seconds + _forward_and_backward_s(tokens.completions, *student.output, dtype)


def reading_s(teacher: Products, tokens: Tokens, dtype: torch.dtype) -> float:
    """A teacher's forwards."""
    rows = tokens.prompts + tokens.completions
    seconds = sum(
        count * product_s(rows, inner, outer, dtype) for inner, outer, count in teacher.layers
    )
    return seconds + product_s(tokens.completions, *teacher.output, dtype)


def writing_s(student: Products, tokens: Tokens, dtype: torch.dtype) -> float:
    """A generator's: each prompt at once, completions token by token."""
    steps = tokens.completions / tokens.at_once
    seconds = 0.0
    for inner, outer, count in student.layers:
        seconds += count * product_s(tokens.prompts, inner, outer, dtype)
        seconds += count * steps * product_s(tokens.at_once, inner, outer, dtype)
    return seconds + steps * product_s(tokens.at_once, *student.output, dtype)


def _forward_and_backward_s(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    return (
        product_s(rows, inner, outer, dtype)
        + product_s(rows, outer, inner, dtype)
        + product_s(rows, inner, outer, dtype)  # the weight's gradient, as many multiplications
    )


@cache
def product_s(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """CPU seconds of a product of [rows, inner] and [inner, outer]: the median of some, written
    into memory that is there. Of many rows a part is measured, as a step computes them in parts.
    """
    if rows > ROWS:
        return rows / ROWS * product_s(ROWS, inner, outer, dtype)
    left = torch.randn(rows, inner).to(dtype)
    right = torch.randn(inner, outer).to(dtype)
    out = left @ right
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        torch.mm(left, right, out=out)
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
