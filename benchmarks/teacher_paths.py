"""The ways to a teacher's scores, side by side: vLLM in the worker's process, the same vLLM behind
HTTP, and the built-in scorer.

All score the same samples of the same random model, one way after the other in each round, for
k = 0, 8 and 32 likeliest tokens; a row has the medians of the rounds. Samples are in groups of 8
with one prompt. `tokens` are all tokens of all samples, whether or not a way computes a prompt once
for its group. CPU seconds are those of all processes of a way, so that a busy machine disturbs them
less than the wall clock; the server has the machine's other core.

Run it as `OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.teacher_paths`.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.vllm_engine import timed
from onstream.settings.root import Settings
from onstream.workers.teacher.external.client import TeacherClient
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.teacher.vllm.startup import load_vllm
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh

KS = (0, 8, 32)
GROUP_SIZE = 8
PROMPT_TOKENS = 160
COMPLETION_TOKENS = (64, 192)
START_S = 240.0
Score = Callable[[Sequence[ScoreRequest], int], object]


def samples(groups: int, prompt_tokens: int, lengths: tuple[int, int]) -> list[ScoreRequest]:
    """Groups of samples whose completions have lengths [tokens] drawn evenly from a range."""
    random = np.random.default_rng(0)

    def ids(tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return random.integers(8, 128, tokens).astype(np.int32)

    prompts = [ids(prompt_tokens) for _ in range(groups)]
    return [
        ScoreRequest(prompt, ids(int(random.integers(*lengths))))
        for prompt in prompts
        for _ in range(GROUP_SIZE)
    ]


def settings_of(model: Path, top_k: int, **orchestrator: Any) -> Settings:
    """A run on the CPU whose teacher is the student's own model."""
    return Settings.model_validate(
        {
            "model": {"name": str(model)},
            "deployment": {"device": "cpu"},
            "inference": {"sampling": {"max_completion": COMPLETION_TOKENS[1]}},
            "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": top_k}},
            "teacher_inference": {"engine": "vllm-in-process", "max_batch_tokens": 2048},
            "orchestrator": orchestrator,
        }
    )


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a vLLM server of `model`, as `onstream up` starts one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    chosen = [
        f"model.name={model}",
        f"teacher_inference.model.name={model}",
        "deployment.device=cpu",
        f"inference.sampling.max_completion={COMPLETION_TOKENS[1]}",
        "trainer.loss.teacher_tau=1",
        f"trainer.loss.teacher_top_k={max(KS)}",
        'teacher_inference.extra_args=["--max-num-batched-tokens", "2048"]',
    ]
    options = [part for override in chosen for part in ("--set", override)]
    command = [sys.executable, "-m", "onstream", "teacher-server", *options, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(server, port)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"the server was not healthy within {START_S:g} s")


def over_http(clients: dict[int, TeacherClient]) -> Score:
    """Asks the server about all samples at once, as far as the client allows."""

    def score(requests: Sequence[ScoreRequest], k: int) -> None:
        client = clients[k]
        waiting = list(range(len(requests)))
        done = 0
        while done < len(requests):
            while waiting and client.pool.in_flight < client.pool.capacity:
                at = waiting.pop()
                client.send(b"", at, requests[at])
            for reply in client.replies(0.1):
                reply.future.result()
                done += 1

    return score


def ways(model: Path, stack: ExitStack) -> dict[str, Score]:
    """Each way by its name, open until `stack` closes."""
    settings = settings_of(model, max(KS))
    engine: Any = stack.enter_context(closing(load_vllm(settings)))
    local = stack.enter_context(closing(load_local(settings)))
    address = stack.enter_context(served(model))
    clients = {}
    for k in KS:
        client = {"base_url": address, "protocol": "vllm-generate", "max_in_flight": 64}
        teacher = {"client": client, "model": {"name": str(model)}}
        opened = TeacherClient(settings_of(model, k, teacher_model=teacher), patient=False)
        clients[k] = stack.enter_context(closing(opened))

    def in_process(shares: bool) -> Score:
        def score(requests: Sequence[ScoreRequest], k: int) -> None:
            engine._engine.reset_prefix_cache()  # it has these very samples
            engine._shares_prompts = shares
            engine.score(requests, top_k=k)

        return score

    return {
        "vLLM in process": in_process(shares=True),
        "vLLM in process, each prompt computed": in_process(shares=False),
        "vLLM over HTTP": over_http(clients),
        "built-in scorer": lambda requests, k: local.score(requests, top_k=k),
    }


def measured(model: Path, requests: Sequence[ScoreRequest], rounds: int) -> Table:
    """A row for each way: tokens/s, and tokens per CPU second, for each k."""
    tokens = sum(request.tokens for request in requests)
    walls = defaultdict[tuple[str, int], list[float]](list)
    cpus = defaultdict[tuple[str, int], list[float]](list)
    with ExitStack() as stack:
        every = ways(model, stack)
        for turn in range(rounds + 1):
            for k in KS:
                for name, score in every.items():
                    wall, cpu = timed(lambda score=score, k=k: score(requests, k))  # type: ignore[misc]
                    if turn:  # the first is not measured
                        walls[name, k].append(tokens / wall)
                        cpus[name, k].append(tokens / cpu)
    columns = [f"k = {k}: tokens/s (a CPU second)" for k in KS]
    title = f"{len(requests)} samples of {tokens} tokens, {os.cpu_count()} cores, "
    table = Table(title + platform.machine(), *columns)
    for name in every:
        figures = ((median(walls[name, k]), median(cpus[name, k])) for k in KS)
        table.add_row(name, *(f"{wall:,.0f} ({cpu:,.0f})" for wall, cpu in figures))
    return table


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, help="a model directory; by default a random one")
    options.add_argument("--prompt", type=int, default=PROMPT_TOKENS, help="tokens of a prompt")
    options.add_argument("--completion", type=int, help="tokens of a completion, at most 192")
    options.add_argument("--groups", type=int, default=6)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shape = ModelShape(hidden=128, layers=4, intermediate=512)
        model = asked.model or write_fresh(Path(scratch), shape, seed=0, initializer_range=0.3)
        one_length = asked.completion and (asked.completion, asked.completion + 1)
        requests = samples(asked.groups, asked.prompt, one_length or COMPLETION_TOKENS)
        Console(width=160).print(measured(model, requests, asked.rounds))


if __name__ == "__main__":
    main()
