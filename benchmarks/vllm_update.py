"""From the announcement of a policy version to the first token that it writes, with requests in
flight in vLLM and the trainer idle.

The example's student by default. Run it as `OMP_NUM_THREADS=1 .venv-vllm/bin/python -m
benchmarks.vllm_update`, once for each mode.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from onstream.pipeline.models.tokenizer import load_configs
from onstream.pipeline.models.weight_shapes import shapes_of
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, publish
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, Engine, GenerationRequest
from onstream.workers.generator.engines.vllm.startup import configure
from onstream.workers.generator.policy_loader import PolicyLoader

STUDENT = Path("examples/reverse-text/student")
MODES = ("recompute", "keep", "abort", "wait")


class Announcements:
    """Stands where a generator reads the newest announced version."""

    def __init__(self) -> None:
        self.newest: PolicyVersion | None = None

    def __call__(self) -> PolicyVersion | None:
        return self.newest


def first_token_s(
    engine: Engine, policies: PolicyLoader, announce: Callable[[], int], in_flight: int
) -> float:
    """Seconds from `announce()`, which returns the version's number, to the first token of that
    version.

    For each request that comes to its end another one takes its place, of one token: so as many
    stay in flight, and a completion tells of the first token at once. The engine is driven as a
    generator drives it: a look for news, then a step. It must have no stop tokens.
    """
    ids = np.arange(8, 32, dtype=np.int32)
    keys = itertools.count(in_flight)
    engine.add(
        [GenerationRequest(key, ids, max_tokens=40 + key, seed=key) for key in range(in_flight)]
    )
    written = list[Completion]()
    while len(written) < 2:
        policies.refresh()
        written += engine.step()
    announced = time.perf_counter()
    number = announce()
    done = written
    while not any(one.version_spans[-1].version == number for one in done):
        engine.add([GenerationRequest(next(keys), ids, max_tokens=1, seed=0) for _ in done])
        policies.refresh()
        done = engine.step()
    seconds = time.perf_counter() - announced
    while engine.active:
        engine.step()
    return seconds


def measure(settings: Settings, directory: Path, rounds: int, in_flight: int) -> list[float]:
    """Seconds of each of `rounds` updates of the student that `settings` name, after one that is
    not counted.
    """
    announcements = Announcements()
    model = Path(settings.model.name)
    state = load_file(model / "model.safetensors")
    versions = [
        publish(directory, number, changed(state, number), model) for number in range(rounds + 2)
    ]
    config = configure(settings, images=False)
    from onstream.workers.generator.engines.vllm.engine import VllmEngine

    engine = VllmEngine(
        config,
        (),
        shapes_of(load_configs(model)[0]),
        on_new_weights=settings.inference.on_new_weights,
    )
    policies = PolicyLoader(
        engine, PolicyFetcher(DirectoryReader(directory), deltas=False), announcements
    )

    def announce() -> int:
        announcements.newest = versions.pop(0)
        return announcements.newest.number

    with contextlib.closing(engine):
        announce()
        policies.refresh()
        return [first_token_s(engine, policies, announce, in_flight) for _ in range(rounds + 1)][1:]


def changed(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Weights a little off `state`, others for an odd `number` than for an even one."""
    return {name: tensor * (1 + number % 2 / 100) for name, tensor in state.items()}


def settings_of(model: Path, mode: str, in_flight: int) -> Settings:
    """A generator's on the CPU, with room for all requests at once and a few more."""
    inference = {
        "engine": "vllm",
        "max_batch": in_flight + 8,
        "on_new_weights": mode,
        "sampling": {"max_completion": 200},
    }
    return Settings.model_validate(
        {"model": {"name": str(model)}, "deployment": {"device": "cpu"}, "inference": inference}
    )


def measured(model: Path, mode: str, rounds: int, in_flight: int) -> list[float]:
    """`measure` of one mode, in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        return measure(settings_of(model, mode, in_flight), Path(directory), rounds, in_flight)


def main() -> None:
    """Print a table, a line for each mode. Each is measured in a process of its own: vLLM's engines
    do not leave one as they found it.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=STUDENT)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    table = Table("inference.on_new_weights", "median s", "least s", "most s")
    for mode in MODES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(
                measured, options.model, mode, options.rounds, options.in_flight
            ).result()
        table.add_row(
            mode, *(f"{value:.3f}" for value in (np.median(found), min(found), max(found)))
        )
    Console().print(
        table,
        f"{options.in_flight} requests in flight, {options.rounds} updates of {options.model} a "
        "mode",
        sep="\n",
    )


if __name__ == "__main__":
    main()
