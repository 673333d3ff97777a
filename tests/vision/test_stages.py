"""Images on their way through the stages, on the real Redis: once each, seen by whoever judges; a dead letter where they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.images import reference_of
from pipeline.loop import Worker
from pipeline.records import Rollout, StageName, Ticket, decode_work
from pipeline.streams import Bus
from pipeline.weights import publish
from settings.root import Settings
from tests.vision.conftest import Tiny, noise
from workers.generator.stage import Generator
from workers.teacher.stage import Teacher

GROUP = 4
ROUTE: list[StageName] = ["score", "train"]

pytestmark = pytest.mark.timeout(60)


def shows(*urls: str) -> list[dict[str, Any]]:
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": "?"}]


def settings_of(tiny: Tiny, directory: Path, contents: list[Any], **sections: Any) -> Settings:
    """A run of `tiny` on a file with a problem for each of `contents`."""
    path = directory / "problems.jsonl"
    rows = [{"messages": [{"role": "user", "content": content}], "answer": "a"} for content in contents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "model": {"name": str(tiny.directory)},
        "run": {"dir": str(directory), "name": "run"},
        "deployment": {"device": "cpu"},
        "task": {"name": "jsonl", "path": str(path)},
        "eval": {"samples": 0},
        "inference": {"max_batch": 64, "sampling": {"max_completion": 4}},
        "orchestrator": {"group_size": GROUP, "batch_size": GROUP},
        "teacher_inference": {"model": {"name": str(tiny.directory)}},
    }
    return Settings.model_validate(asked | sections)


def generate(bus: Bus, settings: Settings, tiny: Tiny, problems: int) -> Worker:
    """A generator that has answered a group for each of `problems`."""
    group = settings.orchestrator.group_size
    policy = publish(settings.run_dir, 0, tiny.model.state_dict(), tiny.directory)
    lease = bus.acquire_lease(60)
    tickets = [Ticket(1 + at, at // group, group, at // group, at, 0, list(ROUTE)) for at in range(problems * group)]
    assert bus.issue(lease, 0, tickets, max_backlog=1000)
    worker = Worker(Generator(settings, bus, lambda: policy), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.backlog()["generate"]:
        worker.turn()
    return worker


def rollouts(bus: Bus, stage: StageName) -> list[Rollout]:
    found = [decode_work(entry.payload) for entry in bus.read(stage, 1000)]
    return [record for record in found if isinstance(record, Rollout)]


def test_a_group_over_one_image_keeps_it_once_and_carries_its_name(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    picture = noise(1, 32, 32)
    generate(bus, settings_of(tiny, tmp_path, [shows(picture.data_url)]), tiny, problems=1)
    made = rollouts(bus, "score")
    assert len(made) == GROUP
    for rollout in made:
        assert rollout.samples[0].images == [picture.digest]
        assert rollout.messages[0]["content"][0]["image_url"]["url"] == reference_of(picture.digest)
    assert bus._ask("HVALS", bus.keys.images) == [picture.data]
    assert sorted(bus.held_numbers()) == [1, 2, 3, 4]


def test_every_bad_image_is_a_dead_letter_with_the_reason_and_the_run_goes_on(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    good = noise(1)
    bad = {
        "data:image/png;base64,####": "not base64",
        "data:image/png;base64," + good.data_url.split(",")[1][:400]: "broken",
        noise(2, 80, 80).data_url: "images.max_pixels is 4096",
        "https://example.org/cat.png": "images.allowed_hosts: none",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=": "one of PNG, JPEG, WEBP",
    }
    contents = [shows(url) for url in bad] + [shows(*[good.data_url] * 3), shows(good.data_url)]
    settings = settings_of(tiny, tmp_path, contents, images={"max_pixels": 4096, "max_per_prompt": 2})
    generate(bus, settings, tiny, problems=len(contents))
    reasons = [letter.reason for letter in bus.dead_letters()]
    assert len(reasons) == GROUP * (len(bad) + 1)
    for words in [*bad.values(), "images.max_per_prompt is 2"]:
        assert sum(words in reason for reason in reasons) == GROUP, words
    assert len(rollouts(bus, "score")) == GROUP
    assert bus._ask("HLEN", bus.keys.images) == 1


def test_a_local_teacher_scores_with_the_image_present(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    """The teacher is the student: it must find every token exactly as likely as the student did, who saw the image."""
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url), shows(noise(2).data_url)])
    generate(bus, settings, tiny, problems=2)
    worker = Worker(Teacher(settings, bus), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.backlog()["score"]:
        worker.turn()
    worker.stage.close(finished=False)
    scored = rollouts(bus, "train")
    assert len(scored) == 2 * GROUP
    for rollout in scored:
        (sample,) = rollout.samples
        generator = np.frombuffer(sample.generator_logprobs, "<f4")
        teacher = np.frombuffer(sample.teacher_logprobs or b"", "<f4")
        assert np.abs(generator - teacher).max() < 1e-4


def test_a_rollout_whose_image_is_gone_is_never_scored_blind(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url)])
    generate(bus, settings, tiny, problems=1)
    bus._ask("DEL", bus.keys.images)
    worker = Worker(Teacher(settings, bus), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.backlog()["score"]:
        worker.turn()
    worker.stage.close(finished=False)
    assert {letter.reason.partition(":")[0] for letter in bus.dead_letters()} == {"it would be scored blind"}
    assert rollouts(bus, "train") == []
