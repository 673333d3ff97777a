"""Hard distillation as the seed page prints it, from a real chat server, with the shipped pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.streams import Bus
from settings.load import load_settings
from tests.chat_server import chat_server
from tests.faulty_server import Answer, Body, serving
from workers.evaluate import evaluate
from workers.generator.chat import ChatGenerator

ROOT = Path(__file__).parents[2]
TEACHER, STUDENT = ROOT / "examples/reverse-text/teacher", ROOT / "examples/reverse-text/student"
SNIPPET = ROOT / "tests/seed_page/hard_distillation.toml"
SOURCE = "orchestrator.teacher_rollout_model"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chat_server(TEACHER, tmp_path_factory.mktemp("server")) as url:
        yield url


class Run:
    """A run of a settings file, with a second one on top that has nothing but the CPU pair and what makes it short."""

    def __init__(self, directory: Path, endpoint: str, first: Path, *extra: str) -> None:
        self.directory = directory / "run"
        top = directory / "top.toml"
        top.write_text(f'[run]\nname = "run"\ndir = "{directory}"\n[model]\nname = "{STUDENT}"\n[deployment]\ndevice = "cpu"\n')
        sets = [f"{SOURCE}.client.base_url={endpoint}", f"{SOURCE}.model.name={TEACHER}", "inference.sampling.max_completion=16", *extra]
        self.sets = [part for one in sets for part in ("--set", one)]
        self.files = [str(first), str(top)]

    def onstream(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("onstream")), *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def up(self) -> str:
        return self.onstream("up", *self.files, *self.sets)

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """`onstream up` in the background; what it prints is what `said` returns."""
        command = [str(Path(sys.executable).with_name("onstream")), "up", *self.files, *self.sets]
        with self.said_in.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as up:
            try:
                yield up
            finally:
                up.terminate()

    @property
    def said_in(self) -> Path:
        return self.directory.parent / "said"

    def said(self) -> str:
        return self.said_in.read_text()

    def steps(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not happens():
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]


def test_a_chat_endpoint_brings_the_student_to_its_accuracy(tmp_path: Path, endpoint: str) -> None:
    run = Run(
        *(tmp_path, endpoint, SNIPPET, "trainer.max_steps=30", "orchestrator.batch_size=64", "orchestrator.group_size=1"),
        *("trainer.optim.lr=1e-3", "trainer.optim.warmup=5", "trainer.optim.schedule=cosine"),
    )
    run.up()
    metrics, (before, after) = run.rows("metrics.jsonl"), run.rows("evals.jsonl")
    teacher = evaluate(TEACHER, load_settings(run.files, overrides=run.sets[1::2], environ={}))
    print(f"exact: student {before['exact']:.3f} -> {after['exact']:.3f}, teacher {teacher['exact']:.3f}")
    assert after["exact"] >= 0.95 * teacher["exact"]
    assert after["exact"] > before["exact"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(row["teacher_kl"] is None and row["ratio_mean"] is None for row in metrics), "no teacher's logprobs, no ratios"
    assert all(row["staleness_max"] == 0 for row in metrics), "no policy wrote these completions"
    workers = {path.stem for path in (run.directory / "logs").glob("*-0.log")} - {"eval-0"}
    assert workers == {"generator-0", "trainer-0", "verifier-0"}, "no teacher process"
    audit = json.loads(run.onstream("audit", str(run.directory)))
    assert (audit["lost"], audit["duplicated"], audit["trained"]) == (0, 0, 30 * 64)


@pytest.mark.parametrize(
    "config",
    ["examples/alphabet_sort/sft_distill_hard.toml", "configs/alphabet_sort/sft_distill_hard_qwen4b_lora_prime_teacher.toml"],
    ids=["whole", "lora"],
)
def test_the_pages_reference_configs_run_on_the_cpu_pair(tmp_path: Path, endpoint: str, config: str) -> None:
    run = Run(
        *(tmp_path, endpoint, ROOT / config, "task.name=reverse-text", "task.system_prompt=", "trainer.max_steps=4"),
        *("orchestrator.batch_size=16", "checkpoint.interval=2", "eval.samples=8", "trainer.optim.lr=1e-3", "trainer.optim.warmup=0"),
    )
    run.up()
    metrics = run.rows("metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["reward"] == 1 for row in metrics), 'keep = "verified" trains on right answers alone'
    checkpoint, policy = run.directory / "checkpoints/step-000004", run.directory / "policies/000004"
    assert (checkpoint / "adapter_model.safetensors").exists() == ("lora" in config)
    assert load_file(policy / "model.safetensors").keys() == load_file(STUDENT / "model.safetensors").keys()
    run.onstream("export", str(run.directory), "--out", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "config.json").exists()


def test_an_endpoint_that_is_away_and_a_generator_that_is_killed_lose_nothing(tmp_path: Path) -> None:
    def answer(body: Body) -> Answer:
        word = body["messages"][-1]["content"].removeprefix("Reverse: ")
        message = {"role": "assistant", "content": word[::-1]}
        return Answer(body={"choices": [{"finish_reason": "stop", "message": message}] * body.get("n", 1)})

    with serving(answer) as (server, url):
        run = Run(
            *(tmp_path, url, SNIPPET, "trainer.max_steps=24", "orchestrator.batch_size=32", "eval.samples=0"),
            *("deployment.status_interval=0.2", f"{SOURCE}.client.breaker_pause=0.5"),
        )
        with run.started() as up:
            run.wait_for(lambda: run.steps() >= 6)
            server.answer = lambda body: Answer(503, {"error": {"message": "overloaded"}})
            run.wait_for(lambda: "waiting for the teacher" in run.said())
            server.answer = answer
            run.wait_for(lambda: run.steps() >= 12)
            generators = [child for child in psutil.Process(up.pid).children(recursive=True) if "generator" in child.cmdline()]
            assert generators
            for generator in generators:
                generator.kill()
            assert up.wait(120) == 0, run.said()[-3000:]
    assert f"waiting for the teacher: {url}: 503 overloaded" in run.said()
    assert "generator-0 " in run.said(), "its death is told"
    audit = json.loads(run.onstream("audit", str(run.directory)))
    assert (audit["lost"], audit["duplicated"], audit["dead"], audit["trained"]) == (0, 0, 0, 24 * 32)


def test_the_model_check_names_what_the_server_lists(tmp_path: Path, endpoint: str, bus: Bus) -> None:
    run = Run(tmp_path, endpoint, SNIPPET, f"{SOURCE}.client.skip_model_check=false")
    stage = ChatGenerator(load_settings(run.files, overrides=run.sets[1::2], environ={}), bus)
    with pytest.raises(UserError, match=r"which .* does not serve; .* it lists: none"):
        stage.setup()
    stage.close(finished=False)
