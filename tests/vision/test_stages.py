"""Images on their way through the stages, on the real Redis: once each, seen by whoever judges; a
dead letter where they cannot be used.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onstream.pipeline.images import ImageFile, image_file, reference_of
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, ids_array
from onstream.pipeline.records import Rollout, StageName, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import publish
from onstream.settings.root import Settings
from onstream.workers.generator.stage import Generator
from onstream.workers.teacher.stage import Teacher
from onstream.workers.tiny_models.character_tokenizer import CONTEXT_TOKENS
from tests.vision.conftest import Tiny, noise, of

GROUP = 4
ROUTE: list[StageName] = ["score", "train"]


def shows(*urls: str) -> list[dict[str, Any]]:
    return [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": "?"},
    ]


def settings_of(tiny: Tiny, directory: Path, contents: list[Any], **sections: Any) -> Settings:
    """A run of `tiny` on a file with a problem for each of `contents`."""
    path = directory / "problems.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": content}], "answer": "a"} for content in contents
    ]
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
    lease = bus.lease.acquire(60)
    tickets = [
        Ticket(1 + at, at // group, group, at // group, at, 0, list(ROUTE))
        for at in range(problems * group)
    ]
    assert bus.lease.issue(lease, 0, tickets, max_backlog=1000)
    worker = Worker(Generator(settings, bus, lambda: policy), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.state.backlog()["generate"]:
        worker.turn()
    return worker


def rollouts(bus: Bus, stage: StageName) -> list[Rollout]:
    found = [decode_work(entry.payload) for entry in bus.streams.read(stage, 1000)]
    return [record for record in found if isinstance(record, Rollout)]


def test_a_group_over_one_image_keeps_it_once_and_carries_its_name(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    picture = noise(1, 32, 32)
    generate(bus, settings_of(tiny, tmp_path, [shows(picture.data_url)]), tiny, problems=1)
    made = rollouts(bus, "score")
    assert len(made) == GROUP
    for rollout in made:
        assert rollout.samples[0].images == [picture.digest]
        assert rollout.messages[0]["content"][0]["image_url"]["url"] == reference_of(picture.digest)
    assert bus.connection.ask("HVALS", bus.keys.images) == [picture.data]
    assert sorted(bus.images.holding_numbers()) == [1, 2, 3, 4]


def line() -> ImageFile:
    return of(Image.new("RGB", (1005, 3)))


def test_every_bad_image_is_a_dead_letter_with_the_reason_and_the_run_goes_on(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    good = noise(1)
    whole = good.data_url.split(",")[1]
    still, turned = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        bad = {
            "data:image/png;base64,####": "not base64",
            "data:image/png;base64," + whole[:400]: "the image is broken",
            "data:image/png;base64," + whole[:40]: "begin with b'\\x89PNG",
            "data:text/plain;base64," + whole: "no data URL of an image",
            noise(2, 80, 80).data_url: "images.max_pixels is 4096",
            line().data_url: "sides of at most 200 to 1",
            "data:image/png;base64," + "A" * 40_000: "images.max_bytes is 20000",
            "data:image/gif;base64,R0lGODlhAQABAAAAACw=": "begin with b'GIF89a",
            "data:image/svg+xml;base64,PHN2Zy8+": "begin with b'<svg/>'",
            of(
                still, "WEBP", save_all=True, append_images=[turned]
            ).data_url: "an animation of 2 frames",
            "https://example.org/cat.png": "images.allowed_hosts: 127.0.0.1",
            f"{silent_url}/cat.png": "took longer than images.fetch_timeout",
            "http://127.0.0.1:port/": "cannot be fetched",
            "file:///etc/passwd": "neither a data URL nor http",
            "": "has no URL",
        }
        contents = [shows(url) for url in bad] + [shows(*[good.data_url] * 3), shows(good.data_url)]
        limits = {
            "max_pixels": 4096,
            "max_bytes": 20_000,
            "max_per_prompt": 2,
            "allowed_hosts": ["127.0.0.1"],
            "fetch_timeout": 0.2,
        }
        settings = settings_of(tiny, tmp_path, contents, images=limits)
        generate(bus, settings, tiny, problems=len(contents))
    reasons = [letter.reason for letter in bus.state.dead_letters(1000)]
    for words in [*bad.values(), "images.max_per_prompt is 2"]:
        assert sum(words in reason for reason in reasons) == GROUP, words
    assert len(reasons) == GROUP * (len(bad) + 1)
    assert len(rollouts(bus, "score")) == GROUP
    assert bus.connection.ask("HLEN", bus.keys.images) == 1


def test_what_a_processor_does_not_take_is_a_dead_letter_too(
    bus: Bus, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of our own is looser here than that of Qwen-VL's processors; LLaVA's takes such a
    picture.
    """
    monkeypatch.setattr(image_file, "MAX_ASPECT", 1000)
    contents = [
        shows(line().data_url),
        shows(of(Image.new("RGB", (1, 1))).data_url),
        shows(noise(1).data_url),
    ]
    generate(bus, settings_of(tiny, tmp_path, contents), tiny, problems=3)
    reasons = [letter.reason for letter in bus.state.dead_letters()]
    if tiny.family == "llava":
        assert reasons == []
        return
    assert len(reasons) == GROUP
    assert all(
        "does not take the image of 1005 × 3 pixels" in reason and "Scale or crop it" in reason
        for reason in reasons
    )
    assert len(rollouts(bus, "score")) == 2 * GROUP


def test_a_prompt_is_never_cut_and_one_beyond_the_context_is_a_dead_letter(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    picture = noise(1, 64, 64)
    tokens = len(tiny.vision.features(picture).token_ids)
    fits = (CONTEXT_TOKENS - 30) // (tokens + 3)
    contents = [
        shows(*[picture.data_url] * fits),
        shows(*[picture.data_url] * (CONTEXT_TOKENS // tokens + 1)),
    ]
    sampling = {"max_batch": 64, "sampling": {"max_completion": CONTEXT_TOKENS}}
    generate(
        bus,
        settings_of(tiny, tmp_path, contents, inference=sampling, images={"max_per_prompt": 1024}),
        tiny,
        problems=2,
    )
    shown = CONTEXT_TOKENS // tokens + 1
    reasons = [letter.reason for letter in bus.state.dead_letters()]
    assert len(reasons) == GROUP
    assert all(
        f"{shown * tokens} of them of its {shown} images; the student's context is {CONTEXT_TOKENS}"
        in reason
        for reason in reasons
    )
    for rollout in rollouts(bus, "score"):
        (sample,) = rollout.samples
        prompt = ids_array(sample.prompt_ids)
        completion = ids_array(sample.completion_ids)
        assert np.count_nonzero(prompt == tiny.vision.placeholder_id) == fits * tokens
        assert len(prompt) + len(completion) <= CONTEXT_TOKENS
        assert tiny.vision.misplaced(prompt, [tiny.vision.features(picture)] * fits) is None


def score(bus: Bus, settings: Settings) -> None:
    """A teacher that has scored all that waits."""
    worker = Worker(Teacher(settings, bus), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.state.backlog()["score"]:
        worker.turn()
    worker.stage.close(finished=False)


def settle(bus: Bus) -> None:
    """A trainer that has acknowledged all that came."""
    assert bus.lease.current is not None
    bus.lease.acknowledge(
        bus.lease.current, {entry.id: entry.number for entry in bus.streams.read("train", 1000)}
    )


def test_what_redis_lost_is_held_again_when_it_is_issued_again(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    picture = noise(1)
    worker = generate(bus, settings_of(tiny, tmp_path, [shows(picture.data_url)]), tiny, problems=1)
    assert bus.lease.current is not None
    bus.connection.ask("DEL", *bus.connection.ask("KEYS", f"{{onstream:{bus.run}}}:*"))
    bus.lease.set_issued(bus.lease.current, GROUP)
    again = [Ticket(number, 0, GROUP, 0, number, 0, list(ROUTE)) for number in range(1, GROUP + 1)]
    assert bus.lease.reissue(bus.lease.current, "again", again)
    while bus.state.backlog()["generate"]:
        worker.turn()
    assert bus.images.read([picture.digest]) == [picture.data]
    assert sorted(bus.images.holding_numbers()) == [1, 2, 3, 4]


def test_a_generator_outlives_a_redis_that_was_emptied_under_it(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    """What it writes then is nobody's any more, and leaves no image behind."""
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url)])
    worker = generate(bus, settings, tiny, problems=1)
    assert bus.lease.current is not None
    bus.lease.issue(
        bus.lease.current, GROUP, [Ticket(5, 1, 1, 0, 5, 0, list(ROUTE))], max_backlog=100
    )
    worker.turn()
    assert worker.stage.busy
    bus.connection.ask("DEL", *bus.connection.ask("KEYS", f"{{onstream:{bus.run}}}:*"))
    while worker.stage.busy:
        worker.turn()
    assert (
        bus.connection.ask(
            "EXISTS", bus.keys.images, bus.keys.images_counted, bus.keys.images_held, bus.keys.dead
        )
        == 0
    )


def test_images_of_rollouts_that_were_given_back_wait_for_whoever_is_next(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url)])
    generate(bus, settings, tiny, problems=1)
    entries = bus.streams.read("score", 100)
    assert bus.streams.give_back("score", [entry.id for entry in entries]) == GROUP
    keys = (bus.keys.images, bus.keys.images_counted, bus.keys.images_held)
    assert [bus.connection.ask("TTL", key) for key in keys] == [-1, -1, -1]
    score(bus, settings)
    assert bus.state.dead_letters() == []
    assert len(rollouts(bus, "train")) == GROUP


def test_a_dead_rollout_asked_for_anew_has_its_image_again(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    """Its first image has gone with its tombstone; the new rollout reads it from the task."""
    picture = noise(1)
    settings = settings_of(tiny, tmp_path, [shows(picture.data_url)])
    worker = generate(bus, settings, tiny, problems=1)
    bus.connection.ask("DEL", bus.keys.images)
    score(bus, settings)
    settle(bus)
    assert len(bus.state.dead_letters()) == GROUP
    assert bus.images.holding_numbers() == []

    assert bus.lease.current is not None
    again = [
        Ticket(GROUP + 1 + at, 1, GROUP, 0, at, 0, list(ROUTE), requeued_from=1 + at)
        for at in range(GROUP)
    ]
    assert bus.lease.issue(bus.lease.current, GROUP, again, max_backlog=100)
    while bus.state.backlog()["generate"]:
        worker.turn()
    assert bus.images.read([picture.digest]) == [picture.data]
    score(bus, settings)
    assert len(bus.state.dead_letters()) == GROUP
    assert len(rollouts(bus, "train")) == GROUP


def test_a_local_teacher_scores_with_the_image_present(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    """The teacher is the student: it must find every token exactly as likely as the student did,
    who saw the image.
    """
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url), shows(noise(2).data_url)])
    generate(bus, settings, tiny, problems=2)
    score(bus, settings)
    scored = rollouts(bus, "train")
    assert len(scored) == 2 * GROUP
    for rollout in scored:
        (sample,) = rollout.samples
        generator = np.frombuffer(sample.generator_logprobs, "<f4")
        teacher = np.frombuffer(sample.teacher_logprobs or b"", "<f4")
        assert np.abs(generator - teacher).max() < 1e-4


def test_a_rollout_whose_image_is_gone_is_never_scored_without_them(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    settings = settings_of(tiny, tmp_path, [shows(noise(1).data_url)])
    generate(bus, settings, tiny, problems=1)
    bus.connection.ask("DEL", bus.keys.images)
    score(bus, settings)
    assert {letter.reason.partition(":")[0] for letter in bus.state.dead_letters()} == {
        "it would be scored without its images"
    }
    assert rollouts(bus, "train") == []
