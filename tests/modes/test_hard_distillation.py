"""Hard distillation as the seed page prints it, from a real chat server, with the shipped pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.load import load_settings
from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.generator.chat_stage import ChatGenerator
from tests.chat_server import chat_server
from tests.faulty_server import Answer, Body, serving
from tests.modes.run import PAGE, ROOT, STUDENT, TEACHER, Run
from tests.processes import worker
from tests.waiting import LONGEST_S

SNIPPET = PAGE / "hard_distillation.toml"
SOURCE = "orchestrator.teacher_rollout_model"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chat_server(TEACHER, tmp_path_factory.mktemp("server")) as url:
        yield url


def hard_run(directory: Path, endpoint: str, first: Path, *extra: str) -> Run:
    """A run whose completions come from `endpoint`."""
    return Run(
        directory,
        first,
        f"{SOURCE}.client.base_url={endpoint}",
        f"{SOURCE}.model.name={TEACHER}",
        *extra,
    )


@pytest.mark.rotates("a run of the page of three minutes", 2, 3)
def test_a_chat_endpoint_brings_the_student_to_its_accuracy(tmp_path: Path, endpoint: str) -> None:
    run = hard_run(
        *(
            tmp_path,
            endpoint,
            SNIPPET,
            "trainer.max_steps=30",
            "orchestrator.batch_size=64",
            "orchestrator.group_size=1",
        ),
        *("trainer.optim.lr=1e-3", "trainer.optim.warmup=5", "trainer.optim.schedule=cosine"),
    )
    run.up()
    metrics = run.rows("metrics.jsonl")
    (before, after) = run.rows("evals.jsonl")
    teacher = evaluate(TEACHER, load_settings(run.files, overrides=run.sets[1::2], environ={}))
    print(
        f"exact: student {before['exact']:.3f} -> {after['exact']:.3f}, "
        f"teacher {teacher['exact']:.3f}"
    )
    assert after["exact"] >= 0.95 * teacher["exact"]
    assert after["exact"] > before["exact"]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(row["teacher_kl"] is None and row["ratio_mean"] is None for row in metrics), (
        "no teacher's logprobs, no ratios"
    )
    assert all(row["staleness_max"] == 0 for row in metrics), "no policy wrote these completions"
    assert run.workers() == {"generator-0", "trainer-0", "verifier-0"}, "no teacher process"
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["trained"]) == (0, 0, 30 * 64)


@pytest.mark.parametrize(
    "config",
    [
        "examples/alphabet_sort/sft_distill_hard.toml",
        "configs/alphabet_sort/sft_distill_hard_qwen4b_lora_prime_teacher.toml",
    ],
    ids=["whole", "lora"],
)
def test_the_pages_reference_configs_run_on_the_cpu_pair(
    tmp_path: Path, endpoint: str, config: str
) -> None:
    run = hard_run(
        *(
            tmp_path,
            endpoint,
            ROOT / config,
            "task.name=reverse-text",
            "task.system_prompt=",
            "trainer.max_steps=4",
        ),
        *(
            "orchestrator.batch_size=16",
            "checkpoint.interval=2",
            "eval.samples=8",
            "trainer.optim.lr=1e-3",
            "trainer.optim.warmup=0",
        ),
    )
    run.up()
    metrics = run.rows("metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["reward"] == 1 for row in metrics), (
        'keep = "verified" trains on right answers alone'
    )
    checkpoint = run.directory / "checkpoints/step-000004"
    policy = run.directory / "policies/000004"
    for directory in (checkpoint, policy):
        assert (directory / "adapter_model.safetensors").exists() == ("lora" in config)
        assert (directory / "model.safetensors").exists() == ("lora" not in config)
    exported = tmp_path / "exported"
    run.onstream("export", str(run.directory), "--out", str(exported))
    assert (exported / "config.json").exists()
    assert (
        load_file(exported / "model.safetensors").keys()
        == load_file(STUDENT / "model.safetensors").keys()
    )


def test_an_endpoint_that_is_away_and_a_generator_that_is_killed_lose_nothing(
    tmp_path: Path,
) -> None:
    def answer(body: Body) -> Answer:
        word = body["messages"][-1]["content"].removeprefix("Reverse: ")
        message = {"role": "assistant", "content": word[::-1]}
        return Answer(
            body={"choices": [{"finish_reason": "stop", "message": message}] * body.get("n", 1)}
        )

    with serving(answer) as (server, url):
        run = hard_run(
            *(
                tmp_path,
                url,
                SNIPPET,
                "trainer.max_steps=24",
                "orchestrator.batch_size=32",
                "eval.samples=0",
            ),
            *("deployment.status_interval=0.2", f"{SOURCE}.client.breaker_pause=0.5"),
        )
        with run.started() as up:
            run.wait_for(lambda: run.steps() >= 6)
            server.answer = lambda body: Answer(503, {"error": {"message": "overloaded"}})
            run.wait_for(lambda: "waiting for the teacher" in run.said())
            server.answer = answer
            run.wait_for(lambda: run.steps() >= 12)
            worker(up.pid, "generator").kill()
            assert up.wait(LONGEST_S) == 0, run.said()[-3000:]
    assert f"waiting for the teacher: {url}: 503 overloaded" in run.said()
    assert "generator-0 " in run.said(), "its death is told"
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["dead"], audit["trained"]) == (
        0,
        0,
        0,
        24 * 32,
    )


def test_the_model_check_names_what_the_server_lists(
    tmp_path: Path, endpoint: str, bus: Bus
) -> None:
    run = hard_run(tmp_path, endpoint, SNIPPET, f"{SOURCE}.client.skip_model_check=false")
    stage = ChatGenerator(load_settings(run.files, overrides=run.sets[1::2], environ={}), bus)
    with pytest.raises(UserError, match=r"which .* does not serve; .* it lists: none"):
        stage.setup()
    stage.close(finished=False)
