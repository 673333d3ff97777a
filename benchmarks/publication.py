"""Publishing a policy version: GB/s and peak memory, the way it was beside the way it is.

    python -m benchmarks.publication [--tokens 64] [--versions 3]

A model of Qwen3-0.6B's shape with random float32 weights is published in bfloat16 into a run
directory, durably, by both ways in turn:

- as it was: every weight is cast to a tensor of its own, all are serialised by the safetensors
  library, copied once more, hashed twice, and written;
- as it is: weights are cast straight into memory that is used again, hashed once in threads, and
  written from there.

Then a step (forward and backward) of `--tokens` tokens is computed alone, and while a version is
published in the background. GB are 10^9 bytes of the published version. Memory is the peak above
what the process holds with the model alone (Linux only), also in parts of the version.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
DTYPE = torch.bfloat16
_GB = 1e9


@dataclass(frozen=True)
class Took:
    """One publication: seconds, seconds of processors, and the peak of memory above the model."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


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
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(QWEN3_06B).eval()
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    size = sum(weight.numel() for weight in state.values()) * DTYPE.itemsize
    with tempfile.TemporaryDirectory(prefix="onstream-publication-") as scratch:
        directory = Directory(Path(scratch))
        print_ways(directory, state, size, asked.versions)
        print_overlap(directory, model, state, asked.tokens)


def print_ways(directory: Directory, state: dict[str, Tensor], size: int, versions: int) -> None:
    """Publish by both ways in turn, and print the medians."""
    before: list[Took] = []
    now: list[Took] = []
    for _ in range(versions):
        before.append(measured(lambda: directory.as_it_was(state)))
        now.append(measured(lambda: directory.as_it_is(state), held=lambda: directory.held_bytes))
        directory.forget()
    # The first version by either way finds no memory to use again.
    for _ in range(versions + 1):
        now.append(measured(lambda: directory.as_it_is(state), held=lambda: directory.held_bytes))
    table = Table(
        "publishing",
        "seconds",
        "GB/s",
        "CPU seconds",
        "peak memory beyond the model",
        "× the version",
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
        )
    console = Console(width=120)
    console.print(f"a version of {size / _GB:.2f} GB, {torch.get_num_threads()} threads")
    console.print(table)
    console.print(f"{rates[-1] / rates[0]:.1f} times the GB/s of before")


def print_overlap(
    directory: Directory, model: torch.nn.Module, state: dict[str, Tensor], tokens: int
) -> None:
    """Print the time of a step, of a publication, and of both at once."""
    ids = torch.randint(0, QWEN3_06B.vocab_size, (1, tokens))

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    alone = seconds_of(step)
    publishing = seconds_of(lambda: directory.as_it_is(state))
    started = time.perf_counter()
    publication = Publication(lambda copied: directory.as_it_is(state, copied), lambda: None)
    step()
    publication.wait_until_copied()
    update_at = time.perf_counter() - started
    publication.result()
    both = time.perf_counter() - started
    table = Table("", "a step", "a version", "one after the other", "both at once", "the step")
    table.add_row(
        "seconds",
        f"{alone:.2f}",
        f"{publishing:.2f}",
        f"{alone + publishing:.2f}",
        f"{both:.2f}",
        f"{update_at:.2f}, until the optimizer may change the weights",
    )
    Console(width=120).print(table)


def measured(publish: Callable[[], object], held: Callable[[], int] = lambda: 0) -> Took:
    """What `publish` takes. `held` says how much it keeps from one call to the next."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS") - held()
    cpu = time.process_time()
    seconds = seconds_of(publish)
    return Took(seconds, time.process_time() - cpu, _status("VmHWM") - before)


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
