"""A generator over vLLM: what it loads before its first rollout, and what becomes of announcements
that it cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.vllm_update import Announcements, changed, first_token_s
from onstream.pipeline.record_codec import ids_array, logprobs_array
from onstream.pipeline.records import Rollout, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, publish
from onstream.workers.generator import policy_loader, stage
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.policy_loader import PolicyLoader
from onstream.workers.generator.stage import Generator
from onstream.workers.generator.student import Student
from tests.vllm.conftest import on_vllm
from tests.vllm.reference import CLOSE_NATS, gaps, model_of

pytestmark = pytest.mark.slow
FIRST = 1000  # policy versions that no other test of the session uses
IN_FLIGHT = 64


@pytest.fixture
def announced() -> Announcements:
    return Announcements()


@pytest.fixture
def generator(
    student: Student,
    student_dir: Path,
    tmp_path: Path,
    bus: Bus,
    announced: Announcements,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], Generator]]:
    """Sets up a generator on the session's engine, which it finds as if it had just started it."""
    monkeypatch.setattr(stage, "open_student", lambda settings: student)
    monkeypatch.setattr(policy_loader, "POLL_S", 0.0)
    monkeypatch.setattr(policy_loader, "RETRY_S", 0.0)
    engine: Any = student.engine
    engine.on_new_weights = "recompute"

    def build() -> Generator:
        settings = on_vllm(student_dir, sampling={"max_completion": 60})
        made = Generator(
            settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path})}),
            bus,
            announced,
        )
        made.setup()
        return made

    yield build
    while engine.active:
        engine.step()


def delivery(number: int, min_policy_version: int) -> Delivery:
    group = (number - 1) // 4
    return Delivery(
        b"%d-0" % number,
        number,
        Ticket(number, group, 4, group, 1000 + number, min_policy_version, ["train"]),
        50,
        1,
        1.0,
    )


def finish(generator: Generator, outcomes: list[Outcome]) -> list[Rollout]:
    while generator.busy:
        outcomes += generator.handle([])
    return [outcome.record for outcome in outcomes if isinstance(outcome.record, Rollout)]


def farthest(models: dict[int, Any], rollouts: list[Rollout]) -> float:
    """How far the rollouts' logprobs are from transformers' at most, in nats."""
    worst = 0.0
    for rollout in rollouts:
        [sample] = rollout.samples
        request = GenerationRequest(0, ids_array(sample.prompt_ids), 1, 0)
        assert rollout.finish_reason is not None
        ids = ids_array(sample.completion_ids)
        logprobs = logprobs_array(sample.generator_logprobs)
        one = Completion(0, ids, logprobs, rollout.finish_reason, sample.version_spans)
        worst = max(worst, float(gaps(models, request, one).max()))
    return worst


def weights(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = model_of(directory).state_dict()
    return state


def test_a_late_joiner_loads_the_newest_version_first_and_goes_on_with_it_past_a_torn_one(
    generator: Callable[[], Generator],
    announced: Announcements,
    student: Student,
    teacher_dir: Path,
    student_dir: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / on_vllm(student_dir).run.name
    announced.newest = publish(run_dir, FIRST + 7, weights(teacher_dir), student_dir)
    late = generator()
    assert student.engine.version == FIRST + 7
    torn = publish(run_dir, FIRST + 8, weights(student_dir), student_dir)
    whole = (run_dir / torn.path / "model.safetensors").read_bytes()
    outcomes = late.handle([delivery(number, FIRST + 7) for number in range(1, 25)])
    (run_dir / torn.path / "model.safetensors").write_bytes(whole[:-8])
    announced.newest = torn
    rollouts = finish(late, outcomes)
    assert len(rollouts) == 24
    assert {span.version for rollout in rollouts for span in rollout.samples[0].version_spans} == {
        FIRST + 7
    }
    assert farthest({FIRST + 7: model_of(teacher_dir)}, rollouts) < CLOSE_NATS
    assert late.room == 0
    assert late.stats.detail.startswith(f"cannot load policy version {FIRST + 8}: ")

    (run_dir / torn.path / "model.safetensors").write_bytes(whole)
    early = late.handle([delivery(number, FIRST + 8) for number in range(25, 33)])
    rollouts = finish(late, early)
    assert len(rollouts) == 8 and late.stats.detail == "" and late.room == 96
    assert farthest({FIRST + 8: model_of(student_dir)}, rollouts) < CLOSE_NATS


@pytest.mark.parametrize("mode", ["recompute", "keep", "abort"])
def test_the_first_token_of_a_new_version_comes_while_requests_are_in_flight(
    generator: Callable[[], Generator],
    announced: Announcements,
    student: Student,
    teacher_dir: Path,
    tmp_path: Path,
    mode: str,
) -> None:
    engine: Any = student.engine
    engine.on_new_weights = mode
    stop_ids = engine._stop_ids
    engine._stop_ids = frozenset()
    begin = FIRST + 100 * len(mode)
    versions = [
        publish(tmp_path, number, changed(weights(teacher_dir), number), teacher_dir)
        for number in range(begin, begin + 4)
    ]

    def announce() -> int:
        announced.newest = versions.pop(0)
        return announced.newest.number

    followed = PolicyLoader(
        engine, PolicyFetcher(DirectoryReader(tmp_path), deltas=False), announced
    )
    try:
        seconds = [
            first_token_s(engine, followed, announce, IN_FLIGHT) for _ in range(len(versions))
        ]
    finally:
        engine._stop_ids = stop_ids
    told = ", ".join(f"{one:.3f}" for one in seconds)
    print(
        f"{mode}: {told} s from the announcement to the first token, with {IN_FLIGHT} requests in "
        "flight"
    )
    assert engine.version == begin + 3
