"""A teacher on vLLM in its worker's process, and prompts with images: it sees them all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.loop import Worker
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.workers.teacher.stage import Teacher
from tests.vision.conftest import Tiny
from tests.vision.test_stages import generate, settings_of
from tests.vllm.own_scores import contents_with_pictures, require_own_scores
from tests.vllm.test_images import tiny_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_of("qwen2.5-vl", tmp_path_factory.mktemp("teacher"))


def settings_with(tiny: Tiny, directory: Path, contents: list[Any]) -> Settings:
    """A run on a problem for each of `contents`, whose teacher is the student itself on vLLM."""
    asked = settings_of(
        tiny, directory, contents, trainer={"loss": {"teacher_top_k": 4}}
    ).model_dump()
    asked["teacher_inference"]["engine"] = "vllm-in-process"
    return Settings.model_validate(asked)


def score(bus: Bus, worker: Worker) -> None:
    while bus.state.backlog()["score"]:
        worker.turn()


@pytest.mark.rotates("a run on vLLM in the teacher's worker", 1, 3)
def test_every_token_is_scored_with_the_images_present(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    contents = contents_with_pictures()
    settings = settings_with(tiny, tmp_path, contents)
    generate(bus, settings, tiny, problems=len(contents))
    worker = Worker(Teacher(settings, bus), bus, settings.delivery, block_s=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn of what torch deprecates
        worker.stage.setup()
    try:
        score(bus, worker)
        require_own_scores(bus, len(contents))
    finally:
        worker.stage.close(finished=False)
