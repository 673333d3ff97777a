"""Rollouts leave Redis for the run's journal, and a trainer that resumes takes them from there: the
same bits, nothing lost, nothing trained twice, wherever it was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.background_sync import BackgroundSync
from onstream.pipeline.run_files.durable import digest_of
from onstream.pipeline.run_files.recording import Recorder
from onstream.workers.inspection.audit import audit
from onstream.workers.trainer.durability import journal_writer
from onstream.workers.trainer.durability import recording as journal
from tests.workers.trainer.driver import Run, digest, killed, rollout

FAR_APART = {"checkpoint__interval": 1000}
ALL = {"issued": 48, "trained": 48}


def folder(job: Run) -> Path:
    return job.trainer.directory.path / recording.JOURNAL


def after_steps(run: Callable[..., Run], steps: int, **changes: Any) -> Run:
    """A run of so many steps whose journal is durable, and that has acknowledged by it."""
    job = run(**{**FAR_APART, **changes})
    job.ready()
    job.until(steps)
    job.answer(count=3)  # of a group of four
    job.turn()
    job.trainer.recording.sync()
    job.turn()
    return job


def assert_goes_on(job: Run, undisturbed: str) -> None:
    job.to_the_end()
    assert digest(job.bus) == undisturbed
    assert job.announced() == [0, 1, 2, 3, 4, 5, 6]
    assert job.counts() == ALL
    assert len(job.rows("trained.jsonl")) == 48


def assert_loses_nothing(job: Run) -> None:
    """It ends. What was issued again and was then too old may have been replaced."""
    job.to_the_end()
    found = job.counts()
    assert found["issued"] == found["trained"] + found.get("dropped", 0)
    assert found["trained"] == 48


def test_with_checkpoints_far_apart_redis_holds_no_more_than_the_window(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(**FAR_APART, trainer__max_steps=30)
    job.ready()
    window = 2 * 8
    held = []
    while job.trainer.step < 30:
        job.answer(count=8)
        job.turn()
        job.trainer.recording.sync()
        job.turn()
        held.append(len(bus.state.numbers("train")))
        assert held[-1] <= window
    assert len(held) >= 30
    assert job.counts()["trained"] == 240


@pytest.mark.parametrize("killed_at", [(1,), (3,), (2, 4), (3, 3)])
def test_what_was_acknowledged_before_any_checkpoint_is_trained_again_to_the_same_bits(
    run: Callable[..., Run], bus: Bus, undisturbed: str, killed_at: tuple[int, ...]
) -> None:
    job = run(**FAR_APART)
    job.ready()
    for step in killed_at:
        job.until(step)
        job.answer(count=3)
        job.turn()
        job.trainer.recording.sync()
        job.turn()
        assert 1 not in bus.state.numbers("train")
        assert job.checkpoints() == []
        found = job.counts()
        assert found["in_flight"] == found["issued"], "none is lost to the audit"
        assert job.start().step == 0
    assert_goes_on(job, undisturbed)
    assert not (folder(job).parent / recording.UNSETTLED).exists(), "it has served"


def test_a_kill_in_the_middle_of_what_is_taken_again_loses_none_of_it(
    run: Callable[..., Run], undisturbed: str
) -> None:
    job = after_steps(run, 4)
    job.start()
    job.turn()  # one step of the four
    assert job.trainer.step == 1
    assert job.trainer.room == 0, "redis comes after the journal"
    job.start()
    job.turn(2)
    assert "lost" not in job.counts()
    job.start()
    assert_goes_on(job, undisturbed)


def test_a_checkpoint_in_the_middle_of_what_is_taken_again_is_resumed_from(
    run: Callable[..., Run], undisturbed: str
) -> None:
    job = after_steps(run, 4)
    job.start(checkpoint__interval=1)
    job.turn(2)
    assert job.checkpoints() == ["step-000001", "step-000002"]
    job.start()
    assert job.trainer.step == 2
    assert_goes_on(job, undisturbed)


def test_what_a_machine_lost_of_the_journal_was_not_acknowledged(
    run: Callable[..., Run], bus: Bus, undisturbed: str
) -> None:
    job = after_steps(run, 2)
    # From here on nothing becomes durable, what was asked for before included.
    job.trainer.recording._sync.close()
    durable = job.trainer.recording.durable
    job.until(4)
    job.turn()
    assert 32 in bus.state.numbers("train")
    os.truncate(folder(job) / f"{0:015d}.segment", durable)
    job.start()
    assert_goes_on(job, undisturbed)


def test_a_torn_last_frame_is_cut_and_its_record_comes_from_redis(
    run: Callable[..., Run], undisturbed: str
) -> None:
    job = after_steps(run, 2)
    path = folder(job) / f"{0:015d}.segment"
    os.truncate(path, path.stat().st_size - 5)
    job.start()
    assert_goes_on(job, undisturbed)


def test_a_kill_between_the_sync_and_the_acknowledgement_is_made_good(
    run: Callable[..., Run], bus: Bus, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run(**FAR_APART)
    job.ready()
    monkeypatch.setattr(job.trainer.checkpointing, "acknowledge", lambda: None)
    job.until(3)
    job.trainer.recording.sync()
    assert 1 in bus.state.numbers("train")
    job.start()
    assert_goes_on(job, undisturbed)
    assert bus.state.numbers("train") == []


@pytest.mark.parametrize("before", ["the cut", "the first frame"])
def test_a_kill_while_a_trainer_resumes_loses_nothing_of_the_journal(
    run: Callable[..., Run], undisturbed: str, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    job = after_steps(run, 3)

    def cut_and_die(directory: Path, keep_bytes: int) -> None:
        if before == "the first frame":
            Recorder(directory, keep_bytes).close()
        killed()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "Recorder", cut_and_die)
        job.start()
    assert "lost" not in job.counts()
    job.start()
    assert_goes_on(job, undisturbed)


def test_a_kill_before_a_recording_has_taken_the_place_of_the_journal_loses_nothing(
    run: Callable[..., Run], undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = after_steps(run, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "_begin", killed)
        job.start(trainer__record=True)
    assert "lost" not in job.counts()
    job.start(trainer__record=True)
    assert_goes_on(job, undisturbed)


def test_a_kill_between_the_checkpoint_and_the_trim_is_made_good(
    run: Callable[..., Run], undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run()
    job.ready()
    job.until(3)
    monkeypatch.setattr(job.trainer.recording, "checkpoint_is_durable", killed)
    with pytest.raises(KeyboardInterrupt):
        job.until(4)
    assert job.start().step == 4
    assert_goes_on(job, undisturbed)


def test_segments_go_when_the_checkpoint_before_the_newest_needs_them_no_more(
    run: Callable[..., Run], undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SEGMENT_BYTES", 1000)
    job = run(checkpoint__interval=1)
    job.ready()
    job.until(4)
    job.turn()
    begin = recording.begin(folder(job))
    assert begin > 0
    assert recording.size_bytes(folder(job)) > begin
    newest = job.trainer.directory.path / "checkpoints" / "step-000004"
    (newest / "trainer.json").write_bytes(b"torn")
    assert job.start().step == 3
    assert_goes_on(job, undisturbed)


def test_a_journal_that_is_lost_is_an_error_in_the_log_and_its_numbers_are_issued_again(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    job = after_steps(run, 3)
    shutil.rmtree(folder(job))
    assert job.counts()["lost"] == 24
    job.start()
    said = capsys.readouterr().out
    assert "rollouts got lost with redis's data or the run's journal" in said
    assert "count=24" in said
    assert_loses_nothing(job)


def test_damage_in_the_journal_is_told_and_what_was_behind_it_is_issued_again(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    job = after_steps(run, 3)
    path = folder(job) / f"{0:015d}.segment"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    job.start()
    said = capsys.readouterr().out
    assert "the run's journal cannot be read to its end" in said
    assert "issuing them again" in said
    assert_loses_nothing(job)


def test_on_an_emptied_redis_a_trainer_takes_from_its_journal_what_it_has(
    run: Callable[..., Run], bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    job = after_steps(run, 3)
    job.lose_redis()
    bus.connection.create_groups()
    job.start()
    assert bus.state.issued() == 28, "up to the group of the last number in the journal"
    assert "count=1 " in capsys.readouterr().out, "the fourth of the group"
    job.ready()
    assert_loses_nothing(job)


def test_a_full_disk_under_the_journal_makes_training_wait_and_go_on(
    run: Callable[..., Run],
    undisturbed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(journal_writer, "time", clock)
    job = after_steps(run, 2)
    record = job.trainer.recording._recorder.record

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.trainer.recording._recorder, "record", full)
    for _ in range(20):
        job.answer(count=8)
        job.turn()
    assert job.trainer.step == 2
    assert job.trainer.stats.detail.startswith("waits for room on the disk for the run's journal")
    assert "No space left on device" in capsys.readouterr().out
    monkeypatch.setattr(job.trainer.recording._recorder, "record", record)
    now[0] += 60
    assert_goes_on(job, undisturbed)


def test_a_journal_that_stays_unwritable_stops_the_trainer_and_loses_nothing(
    run: Callable[..., Run], undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(journal_writer, "time", clock)
    job = after_steps(run, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "record", full)
    with pytest.raises(UserError, match="No space left on device"):
        for _ in range(20):
            job.answer(count=8)
            job.turn()
            now[0] += 60
    monkeypatch.undo()
    job.start()
    assert_goes_on(job, undisturbed)


def test_a_run_of_the_version_before_resumes_and_is_journalled_from_its_checkpoint_on(
    run: Callable[..., Run], undisturbed: str
) -> None:
    job = run()
    job.ready()
    job.until(4)
    job.trainer.recording._sync.close()  # what comes now stays in Redis
    job.answer(count=3)
    job.turn()  # pending in Redis, as that version left them
    shutil.rmtree(folder(job))
    for path in (job.trainer.directory.path / "checkpoints").glob("step-*/trainer.json"):
        state = json.loads(path.read_text())
        del state["journal"]
        path.write_text(json.dumps(state))
        manifest = path.with_name("manifest.json")
        digests = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(digests | {path.name: digest_of(path)}))
    assert job.start().step == 4
    assert_goes_on(job, undisturbed)


def test_a_recording_that_is_switched_on_or_off_takes_along_what_left_redis(
    run: Callable[..., Run], undisturbed: str
) -> None:
    job = after_steps(run, 2)
    for record in (True, False, True):
        assert job.start(trainer__record=record).step == 0
        job.until(3)
        job.trainer.recording.sync()
        job.turn()
    assert "lost" not in job.counts()
    assert_goes_on(job, undisturbed)


def test_a_rollout_refused_before_a_kill_has_one_dead_letter(
    run: Callable[..., Run], bus: Bus
) -> None:
    def unfit(ticket: Any, version: int) -> Any:
        made = rollout(ticket, version)
        if ticket.number == 9:
            made.samples[0].generator_logprobs = b"\x00\x00\xc0\x7f" * len(
                made.samples[0].loss_mask
            )
        return made

    job = run(**FAR_APART)
    job.ready()
    job.until(3, unfit)
    job.trainer.recording.sync()
    job.turn()
    job.start()
    job.to_the_end(unfit)
    assert [letter.number for letter in bus.state.dead_letters()] == [9]
    assert job.counts() == {"issued": 48, "trained": 47, "dead": 1}


def test_the_audit_counts_what_is_in_the_journal_alone_as_in_flight(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = after_steps(run, 3, checkpoint__interval=2)
    found = audit(job.trainer.directory.path, bus)
    assert f"{bus.run}/24" in found["in_flight"]
    assert len(found["trained"]) == 16
    assert found["lost"] == []


def test_a_sync_that_failed_is_told_and_makes_nothing_durable() -> None:
    calls = []

    def sync() -> int:
        calls.append(None)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return 10

    syncs = BackgroundSync(sync)
    assert syncs.durable == 10
    syncs.request()
    syncs._thread.join()
    with pytest.raises(OSError, match="Input/output error"):
        _ = syncs.durable
    with pytest.raises(OSError, match="Input/output error"):
        syncs.now()
    assert len(calls) == 2, "it is not tried again"
    syncs.close()
