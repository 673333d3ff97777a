from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.models.forward import hidden_states
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.logprobs import token_logprobs
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import pack, share_prompts
from onstream.pipeline.record_codec import decode_work, ids_array, logprobs_array
from onstream.pipeline.records import Rollout, Sample
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.teacher.external import ExternalTeacher
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from tests.vllm.server import VllmServer
from tests.workers.teacher.external.conftest import delivered, rollout, work
from tests.workers.teacher.external.test_stage import feed

pytestmark = pytest.mark.slow
PROTOCOLS = ("vllm-generate", "vllm-completions", "echo")
CLOSE_NATS = 1e-4


def configure(
    server: VllmServer, student: Path, *, top_k: int = 0, max_completion: int = 64, **client: Any
) -> Settings:
    client = {"base_url": server.base_url, "breaker_pause": 0.5, **client}
    return Settings.model_validate(
        {
            "model": {"name": str(student)},
            "inference": {"sampling": {"max_completion": max_completion}},
            "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": top_k}},
            "orchestrator": {
                "score_cache": 0,
                "teacher_model": {"client": client, "model": {"name": "teacher"}},
            },
        }
    )


@pytest.fixture
def stage(
    server: VllmServer, student_dir: Path, bus: Bus, request: pytest.FixtureRequest
) -> Iterator[ExternalTeacher]:
    """A stage with the keywords of the test's parameter."""
    stage = ExternalTeacher(configure(server, student_dir, **getattr(request, "param", {})), bus)
    stage.setup()
    yield stage
    stage.close(finished=True)


def some_rollouts(count: int = 24) -> list[Rollout]:
    """Prompts of 1 to 30 tokens and completions of 1 to 64, of every token but the first eight."""
    random = np.random.default_rng(0)
    sizes = [(int(random.integers(1, 31)), int(random.integers(1, 65))) for _ in range(count)]
    draw = [
        (random.integers(8, 128, p).tolist(), random.integers(8, 128, c).tolist()) for p, c in sizes
    ]
    return [
        rollout(number, prompt=prompt, completion=completion)
        for number, (prompt, completion) in enumerate(draw, start=1)
    ]


@torch.no_grad()
def transformers_logprobs(model_dir: Path, sample: Sample) -> torch.Tensor:
    """The log distribution [C, V] at every completion token, by plain transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = ids_array(sample.prompt_ids)
    completion = ids_array(sample.completion_ids)
    ids = torch.from_numpy(np.concatenate((prompt, completion)).astype(np.int64))
    return model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    "stage",
    [{"protocol": name, "top_k": k} for name in PROTOCOLS for k in (0, 4)],
    indirect=True,
    ids=str,
)
def test_the_servers_logprobs_agree_with_transformers_in_every_protocol(
    stage: ExternalTeacher, teacher_dir: Path
) -> None:
    rollouts = some_rollouts()
    worst = 0.0
    for outcome in work(stage, delivered(*rollouts)):
        assert isinstance(outcome.record, Rollout), outcome.dead
        (sample,) = outcome.record.samples
        wanted = transformers_logprobs(teacher_dir, sample)
        ids = torch.from_numpy(ids_array(sample.completion_ids).astype(np.int64))
        scored = torch.from_numpy(logprobs_array(sample.teacher_logprobs or b""))
        worst = max(worst, (wanted.gather(1, ids[:, None])[:, 0] - scored).abs().max().item())
        if sample.teacher_top_ids is not None:
            top_ids = torch.from_numpy(ids_array(sample.teacher_top_ids).astype(np.int64)).view(
                -1, 4
            )
            top = torch.from_numpy(logprobs_array(sample.teacher_top_logprobs or b"")).view(-1, 4)
            assert torch.allclose(wanted.gather(1, top_ids), top, atol=CLOSE_NATS)
            assert torch.allclose(wanted.topk(4).values, top, atol=CLOSE_NATS)
    print(f"vLLM and transformers differ by at most {worst:.1e} nats")
    assert worst < CLOSE_NATS


@torch.no_grad()
def test_the_students_logprobs_agree_with_transformers_on_the_same_tokens(
    student_dir: Path,
) -> None:
    samples = [sample for record in some_rollouts() for sample in record.samples]
    model = load_model(student_dir, dtype=torch.float32, device=torch.device("cpu"))
    prompts, completions = (
        [ids_array(ids) for ids in field]
        for field in zip(*((s.prompt_ids, s.completion_ids) for s in samples), strict=True)
    )
    found: dict[int, torch.Tensor] = {}
    for packed in pack(share_prompts(prompts, completions), 512):
        scored = token_logprobs(
            hidden_states(model, packed),
            head_of(model),
            torch.from_numpy(packed.targets),
            top_k=0,
            chunk=64,
        ).sampled
        found.update(zip(packed.sequences, scored.split(list(packed.lengths)), strict=True))
    for at, sample in enumerate(samples):
        ids = torch.from_numpy(completions[at].astype(np.int64))
        assert torch.allclose(
            transformers_logprobs(student_dir, sample).gather(1, ids[:, None])[:, 0],
            found[at],
            atol=CLOSE_NATS,
        )


def refusal(settings: Settings, bus: Bus) -> str:
    stage = ExternalTeacher(settings, bus)
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        stage.setup()
    assert time.monotonic() - started < 10
    return str(refused.value)


def test_a_context_one_token_too_short_is_refused(
    server: VllmServer, student_dir: Path, bus: Bus
) -> None:
    text = refusal(configure(server, student_dir, max_completion=512), bus)
    assert "is 512 tokens; expected at least 513: a sample of up to 512 tokens" in text


def test_more_likeliest_tokens_than_the_server_gives_are_refused_with_its_limit(
    server: VllmServer, student_dir: Path, bus: Bus
) -> None:
    assert (
        "Set trainer.loss.teacher_top_k = 20, or raise the server's own limit (vLLM: "
        "--max-logprobs)" in refusal(configure(server, student_dir, top_k=24), bus)
    )


def test_a_student_of_another_vocabulary_is_refused(
    server: VllmServer, bus: Bus, tmp_path: Path
) -> None:
    student = write_fresh(tmp_path, ModelShape(hidden=32, layers=1, intermediate=64), seed=1)
    file = student / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"a":', '"A-B":').replace('"b":', '"a":').replace('"A-B":', '"b":')
    )
    assert "the vocabulary of the teacher at" in refusal(configure(server, student), bus)


def test_another_chat_template_is_refused(server: VllmServer, bus: Bus, tmp_path: Path) -> None:
    student = write_fresh(tmp_path, ModelShape(hidden=32, layers=1, intermediate=64), seed=1)
    (student / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    assert "writes a conversation as" in refusal(configure(server, student), bus)


def test_a_model_that_is_not_served_is_refused_naming_the_one_that_is(
    server: VllmServer, student_dir: Path, bus: Bus
) -> None:
    settings = configure(server, student_dir)
    other = Settings.model_validate(
        settings.model_dump()
        | {
            "orchestrator": {
                "teacher_model": {
                    "client": {"base_url": server.base_url},
                    "model": {"name": "other"},
                }
            }
        }
    )
    assert "expected one of the models it lists: 'teacher'" in refusal(other, bus)


def test_a_server_that_is_killed_and_started_again_costs_nothing(
    server: VllmServer, stage: ExternalTeacher, teacher_dir: Path, bus: Bus
) -> None:
    feed(bus, range(1, 101))
    worker = Worker(stage, bus, DeliverySettings(), block_s=0.05)
    while bus.state.backlog()["train"] < 20:
        worker.turn()
    server.kill()
    while not stage.stats.detail.startswith("waiting for the teacher"):
        worker.turn()
    print(stage.stats.detail)
    assert server.base_url in stage.stats.detail
    waiting = bus.state.backlog()
    assert 20 <= waiting["train"] < 100 and waiting["score"] + waiting["train"] == 100
    server.start()
    while bus.state.backlog()["train"] < 100:
        worker.turn()
        time.sleep(0.02)
    done = [decode_work(entry.payload) for _ in range(2) for entry in bus.streams.read("train", 64)]
    assert sorted(record.number for record in done) == list(range(1, 101)), "lost 0, duplicated 0"
    for record in done:
        assert isinstance(record, Rollout) and record.scored_by == server.base_url
        (sample,) = record.samples
        ids = torch.from_numpy(ids_array(sample.completion_ids).astype(np.int64))
        wanted = transformers_logprobs(teacher_dir, sample).gather(1, ids[:, None])[:, 0].numpy()
        np.testing.assert_allclose(
            logprobs_array(sample.teacher_logprobs or b""), wanted, atol=CLOSE_NATS
        )
    assert stage.stats.detail == "" and bus.state.dead_numbers() == []
