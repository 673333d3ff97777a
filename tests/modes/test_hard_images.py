"""Hard distillation with pictures: the shipped teacher that sees, behind a real chat server, and
the student that does not yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from onstream.pipeline.images import ImageLimits, image_urls, read_image, with_urls
from onstream.pipeline.tasks import load_task
from onstream.settings.load import load_settings
from tests.chat_server import chat_server
from tests.modes.run import PAGE, ROOT, Run
from tests.vision.conftest import of

EXAMPLE = ROOT / "examples/colour-words"
TEACHER = EXAMPLE / "teacher"
STUDENT = EXAMPLE / "student"
SOURCE = "orchestrator.teacher_rollout_model"
LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20)
GUESSED = 0.1

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chat_server(TEACHER, tmp_path_factory.mktemp("server")) as url:
        yield url


def hard_run(directory: Path, endpoint: str, first: Path, *extra: str) -> Run:
    """A run of the pair whose completions come from `endpoint`."""
    reached = (
        f"{SOURCE}.client.base_url={endpoint}",
        f"{SOURCE}.model.name={TEACHER}",
        f"model.name={STUDENT}",
    )
    return Run(directory, first, *reached, "inference.sampling.max_completion=24", *extra)


@pytest.mark.rotates("students that learn to read pictures", 1, 3)
def test_an_endpoint_that_sees_teaches_a_student_to_look(tmp_path: Path, endpoint: str) -> None:
    run = hard_run(tmp_path, endpoint, EXAMPLE / "hard.toml")
    run.up()
    metrics = run.rows("metrics.jsonl")
    (before, after) = run.rows("evals.jsonl")
    seconds = metrics[-1]["time"] - metrics[0]["time"]
    print(
        f"exact: {before['exact']:.3f} -> {after['exact']:.3f}, "
        f"swapped {after['exact_swapped']:.3f}, {seconds:.0f} s"
    )
    assert before["exact"] < GUESSED, "it guesses one of 36 pairs"
    assert after["exact"] >= 0.9
    assert after["exact_swapped"] < GUESSED, "it says what it is shown"
    assert sum(row["loss"] for row in metrics[-20:]) / 20 < metrics[0]["loss"] / 4
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["dead"]) == (0, 0, 0)
    assert audit["trained"] == sum(row["rollouts"] for row in metrics)


def test_the_pages_snippet_runs_on_pictures(tmp_path: Path, endpoint: str) -> None:
    """The page's settings as printed, and what a task with pictures and a short run need; group and
    temperature are the defaults.
    """
    snippet = (
        "task.name=colour-words",
        "orchestrator.batch_size=16",
        "trainer.max_steps=3",
        "trainer.optim.lr=1e-3",
        "eval.samples=16",
    )
    run = hard_run(tmp_path, endpoint, PAGE / "hard_distillation.toml", *snippet)
    run.up()
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [1, 2, 3]
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["dead"], audit["trained"]) == (
        0,
        0,
        0,
        3 * 16,
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_server_reads_the_formats_that_the_student_does(endpoint: str, form: str) -> None:
    settings = load_settings([EXAMPLE / "hard.toml"], environ={})
    task = load_task(settings)
    right = 0
    for index in range(20):
        problem = task.held_out(index)
        urls = {
            url: of(read_image(url, LIMITS).decoded(), form).data_url
            for url in image_urls(problem.messages)
        }
        right += written(endpoint, with_urls(problem.messages, urls)) == problem.info["answer"]
    assert right >= 18


def written(endpoint: str, messages: list[dict[str, Any]]) -> str:
    body = {"model": str(TEACHER), "messages": messages, "max_tokens": 24, "temperature": 0.0}
    answer = (
        httpx.post(f"{endpoint}/chat/completions", json=body, timeout=60).raise_for_status().json()
    )
    return str(answer["choices"][0]["message"]["content"])
