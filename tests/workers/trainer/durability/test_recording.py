"""The trainer's recording keeps in step with its checkpoints, and its replay comes to the weights
of the run whatever befell that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.errors import Exit
from onstream.pipeline.record_codec import logprobs_bytes
from onstream.pipeline.records import Rollout, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import RecordFrame, ResumeMark, StepMark, frames
from onstream.workers.replay.output import ReplayOutput
from onstream.workers.replay.replay import replay
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from tests.workers.trainer.driver import CLOCKS, Run, dead, killed, rollout

EQUAL = "the weights after each of them equal the recorded ones, bit for bit; so do the metrics"


def digest(bus: Bus) -> str:
    policy = bus.state.newest_policy()
    assert policy is not None
    return policy.digest


def of(job: Run) -> Path:
    return job.trainer.directory.path / recording.FOLDER


def steps(job: Run) -> list[int]:
    return [frame.step for frame in frames(of(job)) if isinstance(frame, StepMark)]


def opened(job: Run) -> list[int]:
    return [frame.step for frame in frames(of(job)) if isinstance(frame, ResumeMark)]


def assert_replays(job: Run, first: int = 1, last: int = 6) -> None:
    """The replay equals the run, step for step, and in the bytes of its last checkpoint."""
    said: list[str] = []
    out = job.trainer.directory.path.with_name("twin")
    assert (
        replay(
            job.trainer.directory.path,
            [],
            from_step=None,
            stop_at=None,
            out=out,
            worst=0,
            output=ReplayOutput(said.append),
        )
        is Exit.OK
    ), "\n".join(said)
    assert f"steps {first} to {last}: {EQUAL}" in said
    assert (
        f"the recorded run's checkpoint step-{last:06d} has the same weights "
        "and optimizer state, byte for byte"
    ) in said


def with_losses(ticket: Ticket, version: int) -> Rollout | Tombstone:
    """Some die, some lose their whole group, and some cannot be trained on."""
    if ticket.number in (3, 17) or ticket.group == 5:
        return dead(ticket, version)
    made = rollout(ticket, version)
    if ticket.number == 9:
        made.samples[0].generator_logprobs = logprobs_bytes(
            np.full(len(made.samples[0].loss_mask), np.nan)
        )
    return made


@pytest.mark.parametrize("killed_at", [(1,), (3, 5), (2, 2, 4)])
def test_a_run_whose_trainer_was_killed_replays_to_the_same_bits(
    run: Callable[..., Run], killed_at: tuple[int, ...]
) -> None:
    job = run(trainer__record=True)
    job.ready()
    for step in killed_at:
        job.until(step, with_losses)
        job.answer(with_losses, count=5)
        job.turn()
        job.start()
    job.to_the_end(with_losses)
    job.trainer.recording.sync()
    assert steps(job) == [1, 2, 3, 4, 5, 6]
    assert opened(job)[0] == 0 and len(opened(job)) <= 1 + len(killed_at), (
        "what was cut away with a checkpoint's future is no resume"
    )
    assert_replays(job)


def test_a_killed_run_has_the_metrics_and_the_stream_of_an_undisturbed_one(
    run: Callable[..., Run], redis_url: str, run_name: str, model: Path, tmp_path: Path
) -> None:
    bus = Bus.connect(
        redis_url, f"{run_name}-twin", consumer="tester", block_s=0.2, connect_timeout_s=5
    )
    twin = Run(bus, model, tmp_path, trainer__record=True)
    job = run(trainer__record=True)
    for one in (twin, job):
        one.ready()
    twin.to_the_end(by_number)
    job.until(3, by_number)
    job.start()
    job.until(5, by_number)
    job.answer(by_number, count=3)
    job.turn()
    job.trainer.close()
    job.start()
    job.to_the_end(by_number)
    for one in (twin, job):
        one.trainer.recording.sync()
    for mine, other in zip(lasting(job), lasting(twin), strict=True):
        assert {name: (mine[name], other[name]) for name in mine if mine[name] != other[name]} == {}
    assert [row for row in job.rows("trained.jsonl") if row["fate"] != "trained"], (
        "some were dropped"
    )
    assert sorted(map(str, job.rows("trained.jsonl"))) == sorted(
        map(str, twin.rows("trained.jsonl"))
    )
    assert first_times(job) == first_times(twin)
    twin.close_files()
    bus.close()


def by_number(ticket: Ticket, version: int) -> Rollout | Tombstone:
    """The same answer whenever it is asked for; some of every third group were written
    too long ago.
    """
    return with_losses(ticket, max(0, (ticket.number - 1) // 12 - 1 - (ticket.number % 12 == 0)))


def lasting(job: Run) -> list[dict[str, Any]]:
    """The metrics that do not tell of the moment."""
    moments = (*CLOCKS, "queue_train_s", "latency_generate_s", "latency_verify_s", "queue_verify_s")
    return [
        {name: value for name, value in row.items() if name not in moments} for row in job.rows()
    ]


def first_times(job: Run) -> list[int]:
    """The numbers in the order in which they first counted."""
    return list(
        dict.fromkeys(frame.number for frame in frames(of(job)) if isinstance(frame, RecordFrame))
    )


def test_a_kill_between_the_recording_and_the_checkpoint_cuts_it_back(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(3)
    monkeypatch.setattr(LearnerSnapshot, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        job.until(4)
    monkeypatch.undo()
    assert steps(job) == [1, 2, 3, 4], "it was made durable for the checkpoint that never came"
    job.start()
    job.trainer.recording.sync()
    assert steps(job) == [1, 2] and opened(job) == [0, 2]
    job.to_the_end()
    job.trainer.recording.sync()
    assert_replays(job)


def test_a_torn_recording_past_the_checkpoint_harms_nothing(run: Callable[..., Run]) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(3)
    job.trainer.recording.close()
    path = of(job) / "000000000000000.segment"
    path.write_bytes(path.read_bytes()[:-9])
    job.start()
    job.to_the_end()
    job.trainer.recording.sync()
    assert_replays(job)


def test_a_fall_back_to_the_checkpoint_before_takes_the_recording_along(
    run: Callable[..., Run],
) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(5, with_losses)
    (job.trainer.directory.path / "checkpoints/step-000004/trainer.json").write_bytes(b"torn")
    assert job.start().step == 2
    job.trainer.recording.sync()
    assert steps(job) == [1, 2]
    job.to_the_end(with_losses)
    job.trainer.recording.sync()
    assert_replays(job)


def test_a_record_that_comes_again_with_another_reward_counts_as_the_run_took_it(
    run: Callable[..., Run], bus: Bus
) -> None:
    def otherwise(ticket: Ticket, version: int) -> Rollout:
        return rollout(ticket, version, reward=0.25 * (ticket.number % 3))

    job = run(trainer__record=True)
    job.ready()
    job.until(3)
    job.answer(count=5)
    job.turn()
    job.trainer.close()
    job.lose_redis()
    bus.connection.create_groups()
    job.start()
    job.ready()
    job.to_the_end(otherwise)
    job.trainer.recording.sync()
    numbers = [frame.number for frame in frames(of(job)) if isinstance(frame, RecordFrame)]
    assert len(numbers) > len(set(numbers)), (
        "some were taken, lost with Redis's data, and taken again"
    )
    assert_replays(job)


def test_a_learning_rate_that_changed_on_resume_changes_in_the_replay(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(4)
    job.turn()
    job.start(trainer__optim__lr=5e-3)
    job.to_the_end()
    job.trainer.recording.sync()
    assert [row["lr"] for row in job.rows()] == [1e-3] * 4 + [5e-3] * 2
    assert_replays(job)


def stopped_and_resumed(job: Run) -> None:
    """Train, stop in the middle, and go on to the end."""
    job.ready()
    job.until(3)
    job.start()
    job.to_the_end()
    job.trainer.recording.sync()


def test_a_run_at_the_automatic_learning_rate_is_replayed_over_its_resumes(
    run: Callable[..., Run],
) -> None:
    job = run(trainer__record=True, trainer__optim__lr="auto")
    stopped_and_resumed(job)
    assert_replays(job)


def test_dropout_draws_the_same_after_a_kill_and_in_the_replay(run: Callable[..., Run]) -> None:
    source = {"client": {"base_url": ["http://127.0.0.1:1/v1"]}, "model": {"name": "somebody"}}
    supervised = {
        "trainer__loss__type": "sft",
        "orchestrator__teacher_rollout_model": source,
        "orchestrator__use_token_client": False,
    }
    job = run(trainer__record=True, trainer__lora={"rank": 4, "dropout": 0.3}, **supervised)
    stopped_and_resumed(job)
    assert_replays(job)


def test_a_run_that_exists_is_recorded_from_its_checkpoint_on(run: Callable[..., Run]) -> None:
    job = run()
    job.ready()
    job.until(3)
    assert not of(job).exists()
    job.start(trainer__record=True)
    job.to_the_end()
    job.trainer.recording.sync()
    assert opened(job) == [2] and steps(job) == [3, 4, 5, 6]
    assert (of(job) / "start/model.safetensors").exists()
    assert_replays(job, first=3)


def test_a_recording_ends_where_it_is_switched_off_and_the_next_one_sets_it_aside(
    run: Callable[..., Run],
) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(3)
    job.start(trainer__record=False)
    assert steps(job) == [1, 2], "what the run has forgotten is in no recording"
    job.until(5)
    job.start(trainer__record=True)
    job.to_the_end()
    job.trainer.recording.sync()
    assert steps(job) == [5, 6]
    assert [
        frame.step
        for frame in frames(of(job).with_name("recording-1"))
        if isinstance(frame, StepMark)
    ] == [1, 2]
    assert_replays(job, first=5)


def test_a_recording_begun_and_killed_before_its_first_checkpoint_begins_again(
    run: Callable[..., Run],
) -> None:
    job = run(checkpoint__interval=3)
    job.ready()
    job.until(3)
    job.turn()
    for _ in range(2):
        job.start(trainer__record=True)
        job.until(4)
    job.to_the_end()
    job.trainer.recording.sync()
    assert not of(job).with_name("recording-1").exists()
    assert opened(job) == [3]
    assert_replays(job, first=4)


def test_a_recording_shorter_than_its_checkpoint_says_is_logged_and_a_new_one_begins(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(4)
    job.turn()
    path = of(job) / "000000000000000.segment"
    path.write_bytes(path.read_bytes()[:1000])
    job.start()
    assert "the recording is shorter than the checkpoint remembers" in capsys.readouterr().out
    job.to_the_end()
    job.trainer.recording.sync()
    assert_replays(job, first=5)


def test_checkpoints_kept_for_good_keep_their_optimizer_for_replays(
    run: Callable[..., Run],
) -> None:
    job = run(trainer__record=True, checkpoint__interval=1, checkpoint__keep_every=2)
    job.ready()
    job.to_the_end()
    kept = {
        path.name: (path / "optimizer.pt").exists()
        for path in (job.trainer.directory.path / "checkpoints").glob("step-*")
    }
    assert kept == {
        "step-000002": True,
        "step-000004": True,
        "step-000005": True,
        "step-000006": True,
    }


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A replay tells the tensor library its threads by the environment; a test must not leave that
    to others.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    yield
