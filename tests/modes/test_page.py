"""The snippets of the seed page, their files verbatim, on the shipped pair: which workers ran, and
what the metrics show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.modes.run import PAGE, ROOT, STUDENT, TEACHER, Run
from tests.vllm.server import VllmServer

VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
# A reward that one answer in seven earns, against a teacher that holds the student where it is:
# small steps on many rollouts.
BY_REWARD = (
    'task.args={"min_length":4,"max_length":5}',
    "trainer.optim.lr=3e-4",
    "trainer.optim.warmup=10",
    "orchestrator.batch_size=512",
)
LEARNING = (
    "trainer.optim.lr=5e-4",
    "trainer.optim.warmup=5",
    "trainer.optim.schedule=cosine",
    "orchestrator.group_size=4",
)
LARGE = "orchestrator.batch_size=256"

pytestmark = pytest.mark.slow


def shown(run: Run) -> tuple[list[dict[str, Any]], float, float]:
    """The metrics of a run that ended well, and the exact share before and after it."""
    run.up()
    audit = run.audit()
    (before, after) = run.rows("evals.jsonl")
    metrics = run.rows("metrics.jsonl")
    assert audit["lost"] == audit["duplicated"] == audit["dead"] == 0
    assert audit["trained"] == sum(row["rollouts"] for row in metrics) > 0
    return metrics, before["exact"], after["exact"]


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


@pytest.mark.rotates("a run of the page of three minutes", 0, 3)
def test_quick_start_teaches_by_reward_since_its_teacher_is_the_students_own_start(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, PAGE / "quick_start.toml", "trainer.max_steps=80", *BY_REWARD)
    metrics, before, after = shown(run)
    assert run.workers() == {"generator-0", "verifier-0", "teacher-0", "teacher-1", "trainer-0"}
    assert abs(metrics[0]["teacher_kl"]) < 1e-5
    assert metrics[-1]["scored_by"] == {str(STUDENT): 1.0}
    assert mean(metrics[-10:], "reward") > mean(metrics[:10], "reward") + 0.04
    assert after > before - 0.05, "greedy answers get no worse while the sampled ones get better"


def test_another_teacher_model_and_the_rewards_teach_together(tmp_path: Path) -> None:
    named = f"teacher_inference.model.name={TEACHER}"
    run = Run(
        tmp_path,
        PAGE / "quick_start_other_teacher.toml",
        named,
        "trainer.max_steps=80",
        LARGE,
        *LEARNING,
    )
    metrics, before, after = shown(run)
    assert run.workers() == {"generator-0", "verifier-0", "teacher-0", "teacher-1", "trainer-0"}
    assert metrics[-1]["scored_by"] == {str(TEACHER): 1.0}
    assert mean(metrics[-10:], "teacher_kl") < mean(metrics[:1], "teacher_kl") / 2
    assert mean(metrics[-10:], "reward") > mean(metrics[:10], "reward")
    assert after > before


def test_pure_distillation_runs_no_verifier_and_has_no_reward(tmp_path: Path) -> None:
    named = f"teacher_inference.model.name={TEACHER}"
    run = Run(
        tmp_path, PAGE / "pure_distillation.toml", named, "trainer.max_steps=80", LARGE, *LEARNING
    )
    metrics, before, after = shown(run)
    assert run.workers() == {"generator-0", "teacher-0", "teacher-1", "trainer-0"}
    assert all(row["reward"] is None for row in metrics)
    assert all(row["latency_verify_s"] is None for row in metrics)
    assert mean(metrics[-10:], "teacher_kl") < mean(metrics[:1], "teacher_kl") / 2
    assert after > before


@pytest.mark.rotates("a run of the page of three minutes", 1, 3)
def test_an_external_teacher_is_asked_over_http(tmp_path: Path) -> None:
    assert VLLM_PYTHON.exists(), "`make test-modes` makes the environment that the server runs in"
    server = VllmServer(TEACHER, tmp_path / "vllm.log", python=VLLM_PYTHON)
    server.start()
    try:
        server.wait()
        client = "orchestrator.teacher_model.client"
        model = "orchestrator.teacher_model.model"
        addressed = (f'{client}.base_url=["{server.base_url}"]', f"{model}.name=teacher")
        run = Run(
            tmp_path, PAGE / "external_teacher.toml", *addressed, "trainer.max_steps=40", *LEARNING
        )
        metrics, before, after = shown(run)
    finally:
        server.kill()
    assert run.workers() == {"generator-0", "verifier-0", "teacher-external-0", "trainer-0"}
    assert all(row["scored_by"][server.base_url] > 0.5 for row in metrics), (
        "the rest came from the cache of scores"
    )
    assert mean(metrics[-5:], "teacher_kl") < 0.9 * mean(metrics[:5], "teacher_kl")
    assert after > before
