"""A run whose checkpoints, ledger or directory were changed or lost: it says so, and starts from
step 0 only when it is told to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.record_codec import encode
from onstream.pipeline.redis.bus import Bus
from onstream.workers.inspection.audit import audit
from tests.workers.trainer.driver import Run, rollout


def directory(job: Run) -> Path:
    return job.trainer.directory.path


def after_steps(run: Callable[..., Run], steps: int) -> Run:
    job = run()
    job.ready()
    job.until(steps)
    return job


def refused(job: Run) -> str:
    """The words with which a new trainer refuses to begin."""
    with pytest.raises(UserError) as refusal:
        job.start()
    assert refusal.value.exit is Exit.REFUSED
    assert 'run.resume = "restart"' in str(refusal.value)
    return str(refusal.value)


def to_the_end_from_0(job: Run) -> None:
    """Told to, the run begins again, and loses nothing."""
    job.start(run__resume="restart")
    assert job.trainer.step == 0
    job.to_the_end()
    assert "lost" not in job.counts()
    assert "duplicated" not in job.counts()


def test_with_every_checkpoint_torn_a_run_starts_from_0_only_when_told_to(
    run: Callable[..., Run],
) -> None:
    job = after_steps(run, 5)
    for path in (directory(job) / "checkpoints").glob("step-*"):
        (path / "trainer.json").write_bytes(b"torn")
    said = refused(job)
    assert "is torn (kept as torn-step-000002, torn-step-000004)" in said
    assert refused(job) == said, "the second time too, when they have their new names"
    to_the_end_from_0(job)


def test_a_run_whose_directory_is_gone_starts_from_0_only_when_told_to(
    run: Callable[..., Run],
) -> None:
    job = after_steps(run, 5)
    shutil.rmtree(directory(job))
    assert "Redis has 48 rollouts of run" in refused(job)
    to_the_end_from_0(job)


def test_a_run_whose_folder_of_checkpoints_is_gone_starts_from_0_only_when_told_to(
    run: Callable[..., Run],
) -> None:
    job = after_steps(run, 5)
    shutil.rmtree(directory(job) / "checkpoints")
    assert "has the ledger of run" in refused(job)
    to_the_end_from_0(job)


def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on(run: Callable[..., Run]) -> None:
    job = after_steps(run, 1)
    job.start()
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_changed_line_of_the_same_size_is_found_by_the_audit_and_mended_by_the_trainer(
    run: Callable[..., Run], bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    job = after_steps(run, 4)
    ledger = directory(job) / "trained.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"number":3,', b'"number":5,'))
    found = audit(directory(job), bus)
    assert found["beyond"] == ["the ledger is not the one that the checkpoint of step 4 remembers"]
    job.start()
    assert "the ledger is not what the checkpoint remembers" in capsys.readouterr().out
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    assert "beyond" not in audit(directory(job), bus)


def test_a_line_that_changes_between_two_checkpoints_is_found_after_the_second(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = after_steps(run, 2)
    ledger = directory(job) / "trained.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"number":3,', b'"number":5,'))
    job.until(4)
    found = audit(directory(job), bus)
    assert found["beyond"] == ["the ledger is not the one that the checkpoint of step 4 remembers"]


def test_a_checkpoint_of_the_version_before_has_no_digest_of_the_ledger_and_is_resumed(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = after_steps(run, 4)
    for path in (directory(job) / "checkpoints").glob("step-*/trainer.json"):
        state = json.loads(path.read_text())
        del state["ledger_digest"]
        path.write_text(json.dumps(state))
        manifest = path.with_name("manifest.json")
        digests = json.loads(manifest.read_text())
        digests[path.name] = _digest(path)
        manifest.write_text(json.dumps(digests))
    job.start()
    assert job.trainer.step == 4
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def _digest(path: Path) -> str:
    from onstream.pipeline.run_files.durable import digest_of

    return digest_of(path)


def test_forged_rollouts_of_numbers_never_issued_are_not_trained_and_drop_no_real_one(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = after_steps(run, 1)
    planner = job.trainer.tickets.planner
    issued = bus.state.issued()
    for number in range(issued + 1, issued + 101):
        payload = encode(rollout(planner.ticket(number, 0), 0))
        bus.connection.ask("XADD", bus.keys.streams["train"], "*", "n", number, "b", payload)
    found = audit(directory(job), bus)
    assert found["beyond"] == ["the stream of train has 100 entries of numbers never issued"]
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    letters = bus.state.dead_letters(200)
    assert [letter.number for letter in letters] == [0] * 100
    assert f"number {issued + 1} was never issued" in letters[0].reason
    assert "beyond" not in audit(directory(job), bus)
