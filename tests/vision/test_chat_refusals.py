"""Hard distillation: images that cannot be used are asked about nowhere, and answers that would cut
or add one are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onstream.pipeline.images import ImageFile
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.tiny_models.character_tokenizer import CONTEXT_TOKENS, IMAGE
from tests.faulty_server import Answer, Body, serving
from tests.vision.conftest import Tiny, noise
from tests.vision.test_stages import GROUP, rollouts, settings_of, shows


def reply(text: str) -> Callable[[Body], Answer]:
    """An endpoint that answers everything with `text`."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
    }
    return lambda body: Answer(
        body={
            "choices": [choice | {"index": at} for at in range(body.get("n", 1))],
            "usage": {"total_tokens": 10},
        }
    )


def asked(
    bus: Bus, tiny: Tiny, directory: Path, contents: list[Any], text: str, **sections: Any
) -> list[Body]:
    """Has a chat generator answer a group for each of `contents` by an endpoint that says `text`;
    returns what that was asked.
    """
    with serving(reply(text)) as (server, url):
        settings = _settings(tiny, directory, contents, url, sections)
        lease = bus.lease.acquire(60)
        tickets = [
            Ticket(1 + at, at // GROUP, GROUP, at // GROUP, at, 0, ["train"])
            for at in range(len(contents) * GROUP)
        ]
        assert bus.lease.issue(lease, 0, tickets, max_backlog=1000)
        worker = Worker(ChatGenerator(settings, bus), bus, settings.delivery, block_s=0.05)
        worker.stage.setup()
        while bus.state.backlog()["generate"]:
            worker.turn()
        worker.stage.close(finished=True)
        return list(server.bodies)


def _settings(
    tiny: Tiny, directory: Path, contents: list[Any], url: str, sections: dict[str, Any]
) -> Settings:
    source = {"client": {"base_url": [url]}, "model": {"name": "teacher"}}
    orchestrator = {
        "use_token_client": False,
        "group_size": GROUP,
        "batch_size": GROUP,
        "teacher_rollout_model": source,
    }
    teacherless = {
        "orchestrator": orchestrator,
        "teacher_inference": {},
        "trainer": {"loss": {"type": "sft"}},
    }
    return settings_of(tiny, directory, contents, **teacherless, **sections)


def test_what_cannot_be_shown_is_not_asked(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    good = noise(1, 64, 64)
    many = CONTEXT_TOKENS // len(tiny.vision.features(noise(1, 64, 64)).token_ids) + 1
    bad = ["data:image/png;base64,AAAA", "file:///etc/passwd", "https://example.org/cat.png"]
    contents = [*map(shows, bad), shows(*[good.data_url] * many), shows(good.data_url)]
    bodies = asked(bus, tiny, tmp_path, contents, "a", images={"max_per_prompt": 1024})
    assert {len(body["messages"][-1]["content"]) for body in bodies} == {2}
    reasons = [letter.reason for letter in bus.state.dead_letters()]
    wanted = [
        "no whole image",
        "neither a data URL nor http",
        "images.allowed_hosts: none",
        f"its {many} images take {_tokens(tiny, good) * many} tokens",
    ]
    assert [sum(words in reason for reason in reasons) for words in wanted] == [GROUP] * 4
    assert len(reasons) == 4 * GROUP
    assert len(rollouts(bus, "train")) == GROUP


def test_an_answer_that_holds_a_placeholder_is_refused(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    asked(bus, tiny, tmp_path, [shows(noise(1).data_url)], f"a{IMAGE}b")
    reasons = [letter.reason for letter in bus.state.dead_letters()]
    assert len(reasons) == GROUP
    assert all(f"the answer contains {IMAGE!r}, a control token" in reason for reason in reasons)


def test_an_answer_beyond_the_context_is_refused_and_never_cut(
    bus: Bus, tiny: Tiny, tmp_path: Path
) -> None:
    picture = noise(1)
    asked(bus, tiny, tmp_path, [shows(picture.data_url)], "a" * CONTEXT_TOKENS)
    assert all(
        f"the student's context is {CONTEXT_TOKENS}" in letter.reason
        for letter in bus.state.dead_letters()
    )
    assert len(bus.state.dead_letters()) == GROUP


def test_a_prompt_has_all_tokens_of_its_image(bus: Bus, tiny: Tiny, tmp_path: Path) -> None:
    picture = noise(1)
    asked(bus, tiny, tmp_path, [shows(picture.data_url)], "a")
    for rollout in rollouts(bus, "train"):
        (sample,) = rollout.samples
        assert sample.images == [picture.digest]
        assert (
            tiny.vision.misplaced(ids_array(sample.prompt_ids), [tiny.vision.features(picture)])
            is None
        )


def _tokens(tiny: Tiny, picture: ImageFile) -> int:
    return len(tiny.vision.features(picture).token_ids)
