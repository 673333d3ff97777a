"""Publishing a policy version: GB/s and peak memory, the way it was beside the way it is.

    python -m benchmarks.publication [--tokens 64] [--versions 3] [--only publication|checkpoint]

A model of Qwen3-0.6B's shape with random float32 weights is published in bfloat16 into a run
directory, durably, by both ways in turn:

- as it was: every weight is cast to a tensor of its own, all are serialised by the safetensors
  library, copied once more, hashed twice, and written;
- as it is: weights are cast straight into memory that is used again, hashed once in threads, and
  written from there past the page cache.

After each, the version is read as a generator reads it. Then a step (forward and backward) of
`--tokens` tokens is computed alone, and while a version is published in the background. GB are
10^9 bytes of the published version. Memory is the peak above what the process holds with the model
alone (Linux only), also in parts of the version.

Last, checkpoints of a model of 100 million parameters with its optimizer: for how long the trainer
stands still for one that it waits for, as it did, and for one in the background, whose copy the
next step's update waits for.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.run_files.durable import sync
from onstream.pipeline.weights import LoadedPolicy, announced, write_directory
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.policy import serialised
from onstream.pipeline.weights.shards import WEIGHTS_FILE, read_weights
from onstream.workers.trainer.background import BackgroundTask
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpoint import TrainerState
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from onstream.workers.trainer.publication.background import Publication

QWEN3_06B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
OF_100M = Qwen3Config(
    vocab_size=32_000,
    hidden_size=640,
    intermediate_size=1920,
    num_hidden_layers=15,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    tie_word_embeddings=True,
)
DTYPE = torch.bfloat16
_GB = 1e9


@dataclass(frozen=True)
class Took:
    """One publication: seconds, seconds of processors, and the peak of memory above the model.

    Then the seconds that a generator reads it for.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_s: float


class Directory:
    """A run directory that holds the newest version alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_files = path / "student"
        self.model_files.mkdir()
        self._buffer: Bytes | None = None
        self.number = 0

    def as_it_was(self, state: dict[str, Tensor]) -> None:
        """Publish by the procedure of the commit b3bbcbb, in short."""
        from safetensors.torch import save

        self._next()
        cast = {name: weight.detach().to("cpu", DTYPE) for name, weight in state.items()}
        data = np.frombuffer(bytearray(save(cast, metadata={"format": "pt"})), dtype=np.uint8)
        digest = hashlib.sha256(data.data).hexdigest()
        assert hashlib.sha256(data.data).hexdigest() == digest  # the policy in memory was checked
        unfinished = self.path / "policies" / ".unfinished"
        unfinished.mkdir(parents=True)
        (unfinished / "model.safetensors").write_bytes(data.data)
        sync(unfinished / "model.safetensors")
        sync(unfinished)
        unfinished.rename(unfinished.with_name(f"{self.number:06d}"))
        sync(unfinished.parent)

    def as_it_is(
        self, state: dict[str, Tensor], copied: Callable[[], None] = lambda: None
    ) -> PolicyVersion:
        """Publish as the trainer does, without Redis."""
        self._next()
        self._buffer = serialised(state, DTYPE, self._buffer)
        copied()
        policy = LoadedPolicy(self.number, None, self._buffer)
        write_directory(self.path, policy, self.model_files)
        return announced(policy)

    @property
    def newest(self) -> Path:
        """The weights of the newest version."""
        return self.path / "policies" / f"{self.number:06d}" / WEIGHTS_FILE

    def read_as_it_was(self) -> object:
        """Read the newest version as a generator did."""
        return np.fromfile(self.newest, dtype=np.uint8)

    def read_as_it_is(self) -> object:
        """Read the newest version as a generator does."""
        return read_weights(self.newest)

    @property
    def held_bytes(self) -> int:
        """Memory that is kept from one version to the next."""
        return 0 if self._buffer is None else self._buffer.size

    def forget(self) -> None:
        """Give that memory back."""
        self._buffer = None

    def _next(self) -> None:
        shutil.rmtree(self.path / "policies", ignore_errors=True)
        self.number += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="of the step that overlaps")
    parser.add_argument("--versions", type=int, default=3, help="published by each way")
    parser.add_argument("--only", choices=["publication", "checkpoint"])
    asked = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="onstream-publication-") as scratch:
        if asked.only != "checkpoint":
            publications(Path(scratch), asked.versions, asked.tokens)
        if asked.only != "publication":
            print_checkpoints(Path(scratch), asked.versions)


def publications(scratch: Path, versions: int, tokens: int) -> None:
    """Measure and print those of a model of Qwen3-0.6B's shape."""
    model = AutoModelForCausalLM.from_config(QWEN3_06B).eval()
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    size = sum(weight.numel() for weight in state.values()) * DTYPE.itemsize
    directory = Directory(scratch)
    print_ways(directory, state, size, versions)
    print_overlap(directory, model, state, tokens, versions)


def print_ways(directory: Directory, state: dict[str, Tensor], size: int, versions: int) -> None:
    """Publish by both ways in turn, and print the medians."""
    before: list[Took] = []
    now: list[Took] = []

    def as_it_is() -> None:
        held = directory.held_bytes
        now.append(measured(lambda: directory.as_it_is(state), directory.read_as_it_is, held))

    for _ in range(versions):
        before.append(measured(lambda: directory.as_it_was(state), directory.read_as_it_was, 0))
        as_it_is()
        directory.forget()
    # The first version by either way finds no memory to use again.
    for _ in range(versions + 1):
        as_it_is()
    table = Table(
        "publishing",
        "seconds",
        "GB/s",
        "CPU seconds",
        "peak memory beyond the model",
        "× the version",
        "read, s",
    )
    rates = []
    for name, took in (
        ("as it was", before),
        ("as it is, in fresh memory", now[:versions]),
        ("as it is, from the second version on", now[versions + 1 :]),
    ):
        seconds = median(one.seconds for one in took)
        peak = max(one.peak_bytes for one in took)
        cpu_seconds = median(one.cpu_seconds for one in took)
        rates.append(size / _GB / seconds)
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{rates[-1]:.2f}",
            f"{cpu_seconds:.2f}",
            f"{peak / _GB:.2f} GB",
            f"{peak / size:.2f}",
            f"{median(one.read_s for one in took):.2f}",
        )
    console = Console(width=120)
    console.print(
        f"a version of {size / _GB:.2f} GB, {torch.get_num_threads()} threads, {_load()}; medians "
        f"of {versions}"
    )
    console.print(table)
    console.print(f"{rates[-1] / rates[0]:.1f} times the GB/s of before")


def print_overlap(
    directory: Directory,
    model: torch.nn.Module,
    state: dict[str, Tensor],
    tokens: int,
    times: int,
) -> None:
    """Print the time of a step, of a publication, and of both at once."""
    ids = torch.randint(0, QWEN3_06B.vocab_size, (1, tokens))

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def at_once() -> tuple[float, float]:
        started = time.perf_counter()
        publication = Publication(lambda copied: directory.as_it_is(state, copied), lambda: None)
        step()
        publication.wait_until_copied()
        update_at = time.perf_counter() - started
        publication.result()
        return update_at, time.perf_counter() - started

    step()
    alone: list[float] = []
    publishing: list[float] = []
    both: list[tuple[float, float]] = []
    for _ in range(times):
        alone.append(seconds_of(step))
        publishing.append(seconds_of(lambda: directory.as_it_is(state)))
        both.append(at_once())
    table = Table("", "a step", "a version", "one after the other", "both at once", "the step")
    table.add_row(
        "seconds",
        f"{median(alone):.2f}",
        f"{median(publishing):.2f}",
        f"{median(alone) + median(publishing):.2f}",
        f"{median(whole for _, whole in both):.2f}",
        f"{median(update for update, _ in both):.2f}, until the optimizer may change the weights",
    )
    Console(width=120).print(table)


class Student:
    """A model and its optimizer, as far as a checkpoint knows a learner. No tokenizer."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_config(OF_100M)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self._ids = torch.randint(0, OF_100M.vocab_size, (1, 256))

    def gradient(self) -> None:
        """Forward and backward."""
        self.model(input_ids=self._ids, labels=self._ids, use_cache=False).loss.backward()

    def update(self) -> None:
        """Change the weights."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def checkpoint_weights(self) -> dict[str, Tensor]:
        """As `Learner` has it, and the next two."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights

    def state(self) -> dict[str, Any]:
        """The optimizer and the random state."""
        return {"optimizer": self._optimizer.state_dict(), "rng": torch.get_rng_state()}

    def save_checkpoint(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """The model's files."""
        self.model.save_pretrained(directory, state_dict=weights)


def print_checkpoints(scratch: Path, times: int) -> None:
    """Print for how long a trainer stands still for a checkpoint, both ways in turn."""
    student = Student()
    student.gradient()
    student.update()
    policy = PolicyVersion(1, "", "", 0)
    state = TrainerState(1, 1, policy, 1, {}, [], 0, {})
    waited: list[float] = []
    begun: list[float] = []
    at_the_update: list[float] = []
    durable: list[float] = []
    size = 0

    def save(snapshot: LearnerSnapshot) -> None:
        shutil.rmtree(scratch / "checkpoints", ignore_errors=True)
        checkpoint.save(scratch / "checkpoints", state, snapshot.write, nullcontext)

    def snapshot() -> LearnerSnapshot:
        return LearnerSnapshot(student)  # type: ignore[arg-type]

    def copied_and_saved(taken: LearnerSnapshot, copied: Callable[[], None]) -> None:
        taken.copy()
        copied()
        save(taken)

    for _ in range(times):
        waited.append(seconds_of(lambda: save(snapshot())))
        student.gradient()
        student.update()
        started = time.perf_counter()
        taken = snapshot()
        size = taken.size_bytes
        task = BackgroundTask(
            lambda copied, taken=taken: copied_and_saved(taken, copied),  # type: ignore[misc]
            lambda: None,
        )
        begun.append(time.perf_counter() - started)
        student.gradient()
        at_the_update.append(seconds_of(task.wait_until_copied))
        student.update()
        task.result()
        durable.append(time.perf_counter() - started)
    table = Table("a checkpoint", "the trainer stands still, s", "durable after, s")
    table.add_row("waited for", f"{median(waited):.2f}", f"{median(waited):.2f}")
    stops = [first + second for first, second in zip(begun, at_the_update, strict=True)]
    table.add_row(
        "in the background of a step of 256 tokens",
        f"{median(stops):.2f} ({median(begun):.3f} + {median(at_the_update):.2f} at the update)",
        f"{median(durable):.2f}",
    )
    console = Console(width=120)
    console.print(f"a checkpoint of {size / _GB:.2f} GB, {_load()}; medians of {times}")
    console.print(table)


def measured(publish: Callable[[], object], read: Callable[[], object], held_bytes: int) -> Took:
    """What `publish`, and `read` after it, take, where `held_bytes` are held before already."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS") - held_bytes
    cpu = time.process_time()
    seconds = seconds_of(publish)
    cpu_seconds = time.process_time() - cpu
    peak = _status("VmHWM") - before
    return Took(seconds, cpu_seconds, peak, seconds_of(read))


def _load() -> str:
    return "load " + " ".join(f"{load:.1f}" for load in os.getloadavg())


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status; expected Linux")


if __name__ == "__main__":
    main()
