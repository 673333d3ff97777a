"""vLLM beside the engine `transformers`: rollouts written, tokens scored, and what max_batch and
prefetch are worth.

Both engines write the same requests for the same student, one after the other, driven as a
generator drives them. Requests are of two kinds: `short`, as in the example (prompts of 24 to 32
tokens, completions of 5 to 11), and `long` (prompts of 100 to 160, completions of 64 to 192), in
groups of 4 with one prompt. The scores are logprobs of all tokens of short rollouts. CPU seconds
are those of all processes of an engine, so that a busy machine disturbs them less than the wall
clock.

Run it as `OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_engine`; `--sweep` also tries
sizes. `--pair DIRECTORY` compares the writing alone, by the student that `benchmarks.peers` makes
in runs/peers/pair, at its sizes b and c. For the time that an update takes there is
`benchmarks/vllm_update.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.sizes import SIZES
from benchmarks.teacher import rollouts as to_score
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Engine, GenerationRequest
from onstream.workers.generator.student import load_student, open_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh

SWEPT_BATCHES = (16, 64, 128, 256)
SWEPT_PREFETCH = (0, 16, 64, 256)
REPEATS = 3
WIDTH = 120  # characters; a file has no width of its own


@dataclass(frozen=True)
class Kind:
    """Requests whose lengths are drawn evenly from ranges of tokens, in groups with one prompt."""

    prompt: tuple[int, int]
    completion: tuple[int, int]
    group: int = 4

    def requests(self, count: int) -> list[GenerationRequest]:
        """`count` of them, the same every time."""
        random = np.random.default_rng(0)
        prompts = [
            random.integers(8, 128, random.integers(*self.prompt)).astype(np.int32)
            for _ in range(-(-count // self.group))
        ]
        return [
            GenerationRequest(
                key, prompts[key // self.group], int(random.integers(*self.completion)), seed=key
            )
            for key in range(count)
        ]


KINDS = {"short": Kind((24, 33), (5, 12)), "long": Kind((100, 161), (64, 193))}
AS_PEERS = {
    f"size {size.name}": Kind(
        (size.prompt_tokens, size.prompt_tokens + 1),
        (size.max_completion, size.max_completion + 1),
        size.group,
    )
    for size in SIZES.values()
    if size.prompt_tokens is not None
}


def settings_of(model: Path, engine: str, max_batch: int = 256) -> Settings:
    """A generator's on the CPU."""
    inference = {"engine": engine, "max_batch": max_batch}
    return Settings.model_validate(
        {"model": {"name": str(model)}, "deployment": {"device": "cpu"}, "inference": inference}
    )


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Any]:
    """The engine of a generator with these settings, whose completions no token ends."""
    student = (
        open_student(settings)
        if settings.inference.engine == "vllm"
        else load_student(settings.model.name, settings)
    )
    engine: Any = student.engine
    setattr(engine, "_stop_ids" if settings.inference.engine == "vllm" else "_stop", frozenset())
    with contextlib.closing(engine):
        yield engine


def write(engine: Engine, requests: Sequence[GenerationRequest], prefetch: int = 64) -> None:
    """All of `requests`, with `prefetch` more in hand than are decoded, as far as there are."""
    waiting = list(requests)[::-1]
    done = 0
    while done < len(requests):
        engine.add(
            [
                waiting.pop()
                for _ in range(min(len(waiting), engine.slots + prefetch - engine.active))
            ]
        )
        done += len(engine.step())


def fastest(engine: Engine, requests: Sequence[GenerationRequest], prefetch: int) -> float:
    """Seconds that all of `requests` take, the least of a few times: what other programs take from
    the machine only adds to it.
    """
    return min(timed(lambda: write(engine, requests, prefetch))[0] for _ in range(REPEATS))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and its children, that `work` takes."""
    cpu = cpu_seconds()
    wall = time.perf_counter()
    work()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """CPU seconds of this process and of its living children so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def compare_writing(model: Path, counts: Mapping[str, int]) -> Table:
    """A line for each kind of requests, of which there are so many, and each engine."""
    columns = ("requests", "engine", "rollouts/s", "tokens/s", "rollouts per CPU second")
    numbers = " and ".join(f"{number} {kind}" for kind, number in counts.items())
    table = Table(*columns, title=f"{numbers} rollouts, max_batch 256, prefetch 64")
    for name in ("transformers", "vllm"):
        with opened(settings_of(model, name)) as engine:
            for kind, number in counts.items():
                requests = (KINDS | AS_PEERS)[kind].requests(number)
                write(engine, requests[: number // 4])  # warms up
                wall, cpu = timed(lambda engine=engine, requests=requests: write(engine, requests))  # type: ignore[misc]
                tokens = sum(request.max_tokens for request in requests)
                table.add_row(
                    kind,
                    name,
                    f"{number / wall:,.4g}",
                    f"{tokens / wall:,.0f}",
                    f"{number / cpu:,.4g}",
                )
    return table


def compare_scoring(model: Path, groups: int) -> Table:
    """Print how many tokens a second the local teacher scores, and vLLM in process."""
    requests = to_score(model, groups, 8)
    tokens, table = (
        sum(request.tokens for request in requests),
        Table("scored by", "tokens/s", "tokens per CPU second"),
    )
    scorer = load_local(settings_of(model, "transformers"))
    scorer.score(requests, top_k=0)
    measured = {"the local teacher": timed(lambda: scorer.score(requests, top_k=0))}
    with opened(settings_of(model, "vllm")) as engine:
        score_by_vllm(engine, requests[:64])
        measured["vLLM"] = timed(lambda: score_by_vllm(engine, requests))
    for name, (wall, cpu) in measured.items():
        table.add_row(name, f"{tokens / wall:,.0f}", f"{tokens / cpu:,.0f}")
    table.title = f"logprobs of {len(requests)} rollouts of {tokens / len(requests):.0f} tokens"
    return table


def score_by_vllm(engine: Any, requests: Sequence[Any]) -> None:
    """Logprobs of every token of `requests`, all asked for at once."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    async def score(number: int, ids: list[int]) -> None:
        async for _ in engine._llm.generate(tokens_input(ids), sampling, f"score-{number}"):
            pass

    async def score_all() -> None:
        rows = [
            np.concatenate((request.prompt_ids, request.completion_ids)).tolist()
            for request in requests
        ]
        await asyncio.gather(*(score(number, row) for number, row in enumerate(rows)))

    engine._background.run(score_all())


def sweep(model: Path, count: int) -> Iterator[Table]:
    """Rollouts a second by max_batch and prefetch, for each engine and kind of requests, the best
    of a few times.
    """
    for name in ("transformers", "vllm"):
        tables = {
            kind: Table("max_batch", *(f"prefetch {prefetch}" for prefetch in SWEPT_PREFETCH))
            for kind in KINDS
        }
        for max_batch in SWEPT_BATCHES:
            with opened(settings_of(model, name, max_batch)) as engine:
                for kind, number in (("short", count), ("long", count // 4)):
                    requests = KINDS[kind].requests(number)
                    write(engine, requests[: number // 4])
                    rates = [
                        number / fastest(engine, requests, prefetch) for prefetch in SWEPT_PREFETCH
                    ]
                    tables[kind].add_row(str(max_batch), *(f"{rate:,.0f}" for rate in rates))
        for kind, table in tables.items():
            table.title = f"{name}, {kind} rollouts/s"
            yield table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rollouts", 2048), ("hidden", 96), ("layers", 3), ("groups", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sweep", action="store_true", help="also try sizes: eight more starts")
    parser.add_argument("--pair", type=Path, help="a directory with a model in student/")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    console = Console(width=WIDTH)
    if options.pair:
        counts = dict.fromkeys(AS_PEERS, options.rollouts)
        console.print(compare_writing(options.pair / "student", counts))
        return
    shape = ModelShape(
        hidden=options.hidden, layers=options.layers, intermediate=options.hidden * 10 // 3
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = write_fresh(Path(scratch), shape, seed=0, initializer_range=0.1)
        counts = {"short": options.rollouts, "long": options.rollouts // 4}
        console.print(compare_writing(model, counts))
        console.print(compare_scoring(model, options.groups))
        if options.sweep:
            for table in sweep(model, options.rollouts):
                console.print(table)


if __name__ == "__main__":
    main()
