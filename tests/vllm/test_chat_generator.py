"""Hard distillation from a real vLLM server's chat endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Rollout, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.root import Settings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.vllm.server import VllmServer

pytestmark = pytest.mark.slow


def configure(server: VllmServer, student: Path, model: str = "teacher") -> Settings:
    source = {"client": {"base_url": server.base_url}, "model": {"name": model}}
    return Settings.model_validate(
        {
            "model": {"name": str(student)},
            "inference": {"sampling": {"max_completion": 12}},
            "orchestrator": {
                "use_token_client": False,
                "batch_size": 8,
                "group_size": 4,
                "teacher_rollout_model": source,
            },
            "trainer": {"loss": {"type": "sft"}},
        }
    )


@pytest.fixture
def stage(server: VllmServer, student_dir: Path, bus: Bus) -> Iterator[ChatGenerator]:
    stage = ChatGenerator(configure(server, student_dir), bus)
    stage.setup()
    yield stage
    stage.close(finished=True)


def delivery(number: int) -> Delivery:
    group = (number - 1) // 4
    return Delivery(
        b"%d-0" % number, number, Ticket(number, group, 4, group, number, 0, ["train"]), 50, 1, 1.0
    )


def test_a_group_is_one_request_for_several_choices(stage: ChatGenerator) -> None:
    outcomes: list[Outcome] = stage.handle([delivery(number) for number in range(1, 9)])
    while stage.busy:
        outcomes += stage.handle([])
    assert sorted(outcome.delivery.number for outcome in outcomes) == list(range(1, 9))
    assert stage.stats.numbers["requests"] == 2
    rollouts = [outcome.record for outcome in outcomes if isinstance(outcome.record, Rollout)]
    assert len({rollout.samples[0].completion_text for rollout in rollouts}) > 2, (
        "choices of one prompt are samples, not copies"
    )
    tokenizer = character_tokenizer()
    for rollout in rollouts:
        ids = ids_array(rollout.samples[0].completion_ids).tolist()
        ended = rollout.finish_reason == "stop"
        assert tokenizer.decode(ids) == rollout.samples[0].completion_text + (
            "<|im_end|>" if ended else ""
        )
        assert ended == (ids[-1] == tokenizer.eos_token_id)


def test_a_model_that_it_does_not_serve_is_refused_with_the_one_that_it_does(
    server: VllmServer, student_dir: Path, bus: Bus
) -> None:
    stage = ChatGenerator(configure(server, student_dir, model="gpt-9"), bus)
    with pytest.raises(
        UserError, match=r"model.name = 'gpt-9', which .* does not serve; .* it lists: 'teacher'"
    ):
        stage.setup()
    stage.close(finished=False)
