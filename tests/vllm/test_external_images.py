"""An external teacher that is a vLLM server, and prompts with images: scored with them present, or
not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.workers.teacher.external import ExternalTeacher
from tests.vision.conftest import Tiny, noise
from tests.vision.test_stages import GROUP, generate, rollouts, settings_of, shows
from tests.vllm.own_scores import contents_with_pictures, require_own_scores
from tests.vllm.server import VllmServer
from tests.vllm.test_images import tiny_of

pytestmark = [pytest.mark.slow, pytest.mark.rotates("images on vLLM", 2, 3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_of("qwen2.5-vl", tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real server of the model, as the teacher."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = VllmServer(tiny.directory, tmp_path_factory.mktemp("vllm") / "vllm.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def settings_with(
    tiny: Tiny, server: VllmServer, directory: Path, contents: list[Any], **client: Any
) -> Settings:
    """A run on a problem for each of `contents`, whose teacher is `server`, which is the student
    itself.
    """
    teacher = {
        "client": {"base_url": server.base_url, "breaker_pause": 0.5, **client},
        "model": {"name": "teacher"},
    }
    orchestrator = {"group_size": GROUP, "batch_size": GROUP, "teacher_model": teacher}
    return settings_of(
        tiny, directory, contents, orchestrator=orchestrator, trainer={"loss": {"teacher_top_k": 4}}
    )


def score(bus: Bus, settings: Settings) -> None:
    worker = Worker(ExternalTeacher(settings, bus), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    try:
        while bus.state.backlog()["score"]:
            worker.turn()
    finally:
        worker.stage.close(finished=False)


def test_every_token_is_scored_with_the_images_present(
    bus: Bus, tiny: Tiny, server: VllmServer, tmp_path: Path
) -> None:
    contents = contents_with_pictures()
    settings = settings_with(tiny, server, tmp_path, contents)
    generate(bus, settings, tiny, problems=len(contents))
    score(bus, settings)
    require_own_scores(bus, len(contents))


def test_a_rollout_whose_image_is_gone_is_never_scored_without_them(
    bus: Bus, tiny: Tiny, server: VllmServer, tmp_path: Path
) -> None:
    settings = settings_with(tiny, server, tmp_path, [shows(noise(1).data_url)])
    generate(bus, settings, tiny, problems=1)
    bus.connection.ask("DEL", bus.keys.images)
    score(bus, settings)
    assert {letter.reason.partition(":")[0] for letter in bus.state.dead_letters()} == {
        "it would be scored without its images"
    }
    assert rollouts(bus, "train") == []


def test_a_teacher_that_would_judge_images_blind_is_refused_at_the_start(
    bus: Bus, tiny: Tiny, server: VllmServer, tmp_path: Path
) -> None:
    settings = settings_with(
        tiny, server, tmp_path, [shows(noise(1).data_url)], protocol="vllm-completions"
    )
    with pytest.raises(
        UserError,
        match=r"would score them without: the protocol is vllm-completions, which sends token ids "
        r"alone",
    ):
        ExternalTeacher(settings, bus).setup()
