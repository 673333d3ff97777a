"""Prompts with images before a chat endpoint, which gets them as they came; the student trains on
them as its own processor reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from onstream.pipeline.images import ImageFile, Message, referred
from onstream.pipeline.loop import Worker
from onstream.pipeline.models.multimodal import joined
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Rollout, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.tiny_models.character_tokenizer import IMAGE, IMAGE_END, IMAGE_START
from tests.faulty_server import Answer, Body, FaultyServer, serving
from tests.vision.conftest import Tiny, noise, of
from tests.vision.test_stages import rollouts

GROUP = 2
WRITTEN = "red blue"
OF_PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ "
    "'<|vision_start|><|image_pad|>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] "
    "}}{% endfor %}"
    "{{ '<|vision_end|>' if message['role'] != 'assistant' }}{% endfor %}{{ 'ASSISTANT: ' if "
    "add_generation_prompt }}"
)


@pytest.fixture
def endpoint() -> Iterator[FaultyServer]:
    """Writes the same answer to everything; what tells of the prompt is what it was asked."""

    def answer(body: Body) -> Answer:
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": WRITTEN}}
        return Answer(body={"choices": [choice] * body.get("n", 1)})

    with serving(answer) as (server, _):
        yield server


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asked(*parts: dict[str, Any]) -> list[Message]:
    return [{"role": "user", "content": list(parts)}]


def formats() -> list[ImageFile]:
    """A PNG, a JPEG and a WebP file, of different pixels."""
    return [of(noise(seed).decoded(), form) for seed, form in enumerate(("PNG", "JPEG", "WEBP"))]


def generate(
    bus: Bus, tiny: Tiny, directory: Path, endpoint: FaultyServer, problems: Sequence[list[Message]]
) -> list[Rollout]:
    """The rollouts of a group for each of `problems`."""
    path = directory / "problems.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": messages, "answer": WRITTEN}) + "\n" for messages in problems
        )
    )
    source = {"client": {"base_url": [endpoint.base_url]}, "model": {"name": "teacher"}}
    sections = {
        "model": {"name": str(tiny.directory)},
        "run": {"dir": str(directory), "name": "run"},
        "deployment": {"device": "cpu"},
        "task": {"name": "jsonl", "path": str(path)},
        "eval": {"samples": 0},
        "orchestrator": {
            "use_token_client": False,
            "group_size": GROUP,
            "batch_size": GROUP,
            "teacher_rollout_model": source,
        },
        "trainer": {"loss": {"type": "sft"}},
    }
    settings = Settings.model_validate(sections)
    tickets = [
        Ticket(1 + at, at // GROUP, GROUP, at // GROUP, at, 0, ["train"])
        for at in range(len(problems) * GROUP)
    ]
    assert bus.lease.issue(bus.lease.acquire(60), 0, tickets, max_backlog=1000)
    worker = Worker(ChatGenerator(settings, bus), bus, settings.delivery, block_s=0.05)
    worker.stage.setup()
    while bus.state.backlog()["generate"]:
        worker.turn()
    worker.stage.close(finished=False)
    return rollouts(bus, "train")


def test_several_images_in_several_turns_reach_the_endpoint_and_the_trainer_in_their_order(
    bus: Bus, tiny: Tiny, tmp_path: Path, endpoint: FaultyServer
) -> None:
    png, jpeg, webp = formats()
    messages = [
        *asked(image(png.data_url), text("and"), image(jpeg.data_url), text("?")),
        {"role": "assistant", "content": "yes"},
        *asked(text("then"), image(webp.data_url), image(png.data_url)),
    ]
    made = generate(bus, tiny, tmp_path, endpoint, [messages])
    assert [body["messages"] for body in endpoint.bodies] == [messages], (
        "as they came, once for the group"
    )
    assert [body["n"] for body in endpoint.bodies] == [GROUP]

    processor = AutoProcessor.from_pretrained(tiny.directory)
    shown = [png, jpeg, webp, png]
    chat = processor.apply_chat_template([*messages, {"role": "assistant", "content": WRITTEN}])
    whole = processor(
        text=[chat], images=[picture.decoded() for picture in shown], return_tensors="pt"
    )
    assert len(made) == GROUP
    for rollout in made:
        (sample,) = rollout.samples
        ids = [*ids_array(sample.prompt_ids), *ids_array(sample.completion_ids)]
        assert ids == whole["input_ids"][0].tolist()
        assert (
            tiny.vision.tokenizer.decode(ids_array(sample.completion_ids))
            == f"{WRITTEN}{tiny.vision.tokenizer.eos_token}"
        )
        assert sample.images == referred(rollout.messages) == [picture.digest for picture in shown]
        kept = [ImageFile(data or b"") for data in bus.images.read(sample.images)]
        for name, tensor in joined([tiny.vision.features(picture) for picture in kept]).items():
            assert torch.equal(tensor, whole[name]), name
    assert bus.connection.ask("HLEN", bus.keys.images) == 3


def test_a_template_that_knows_parts_alone_shows_the_images_and_the_answer(
    bus: Bus, tiny: Tiny, tmp_path: Path, endpoint: FaultyServer
) -> None:
    """Of LLaVA's kind: images first, by the type `image`; a content that is a plain text is not
    shown at all.
    """
    student = shutil.copytree(tiny.directory, tmp_path / "student")
    (student / "chat_template.jinja").write_text(OF_PARTS)
    picture = noise(1)
    messages = [
        {"role": "system", "content": "look"},
        *asked(text("which?"), image(picture.data_url)),
    ]
    made = generate(bus, replace(tiny, directory=student), tmp_path, endpoint, [messages])
    assert len(made) == GROUP
    for rollout in made:
        (sample,) = rollout.samples
        prompt = tiny.vision.tokenizer.decode(ids_array(sample.prompt_ids)).replace(IMAGE, "")
        assert prompt == f"SYSTEM: look{IMAGE_END}USER: {IMAGE_START}which?{IMAGE_END}ASSISTANT: "
        assert (
            tiny.vision.misplaced(ids_array(sample.prompt_ids), [tiny.vision.features(picture)])
            is None
        )
        assert (
            tiny.vision.tokenizer.decode(ids_array(sample.completion_ids))
            == WRITTEN + tiny.vision.tokenizer.eos_token
        )
    assert [body["messages"] for body in endpoint.bodies] == [messages]
