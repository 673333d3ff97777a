"""A large version is published in a thread while the next step is computed: the same weights, the
same files and the same guarantees as one that the trainer waits for.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onstream.pipeline.errors import LeaseLost, UserError
from onstream.pipeline.heartbeat import Heartbeat, LoopState
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.stage import Stats
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, directory_store, packer
from onstream.pipeline.weights.redis_store import ChunkReader
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.trainer.background import WAKES_S
from onstream.workers.trainer.publication import publisher
from onstream.workers.trainer.publication.background import Publication
from tests.waiting import LONGEST_S
from tests.workers.trainer.driver import CLOCKS, Gate, Run, killed, twin_to_the_end
from tests.workers.trainer.durability.test_recording import assert_replays


@pytest.fixture
def undisturbed(redis_url: str, run_name: str, model: Path, tmp_path: Path) -> Iterator[Run]:
    """A run whose trainer waited for every version."""
    with twin_to_the_end(redis_url, run_name, model, tmp_path, checkpoint__keep_policies=9) as job:
        yield job


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "BACKGROUND_BYTES", 0)


@pytest.fixture
def late(in_background: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No version is out before the trainer waits for it: all that can overlap does."""
    wanted = threading.Event()
    wait = Publication.wait
    copied = packer.serialised

    def waiting(publication: Publication) -> None:
        wanted.set()
        wait(publication)

    def copied_then_late(*args: Any) -> Any:
        wanted.clear()
        return copied(*args)

    class LatePolicy(publisher.LoadedPolicy):
        def __init__(self, *args: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert wanted.wait(LONGEST_S)
            super().__init__(*args)

    monkeypatch.setattr(Publication, "wait", waiting)
    monkeypatch.setattr(packer, "serialised", copied_then_late)
    monkeypatch.setattr(publisher, "LoadedPolicy", LatePolicy)


def without_clocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in CLOCKS} for row in rows]


def digests(job: Run) -> list[tuple[int, str]]:
    return [(policy.number, policy.digest) for policy in job.bus.state.announced_policies()]


def test_the_next_step_is_computed_before_a_version_is_out(
    run: Callable[..., Run], in_background: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    write = directory_store.write_weights
    job = run()
    job.ready()
    monkeypatch.setattr(
        directory_store, "write_weights", lambda *args: (gate.passes(), write(*args))
    )
    learner = job.trainer.training.learner
    step = learner.step
    seen: list[tuple[int, list[int]]] = []

    def noted(*args: Any, **options: Any) -> dict[str, Any]:
        metrics = step(*args, **options)
        seen.append((learner.steps, job.announced()))
        if learner.steps == 2:
            gate.open()
        return metrics

    monkeypatch.setattr(learner, "step", noted)
    job.until(2)
    assert gate.reached.is_set()
    assert seen == [(1, [0]), (2, [0])]
    monkeypatch.undo()
    job.to_the_end()
    assert job.announced() == list(range(7))


@pytest.mark.parametrize("changes", [{}, {"trainer__dtype": "bfloat16", "weights__delta": True}])
def test_a_run_whose_versions_are_late_comes_to_the_same_weights_rows_and_counts(
    run: Callable[..., Run], undisturbed: Run, late: None, changes: dict[str, Any]
) -> None:
    job = run(checkpoint__keep_policies=9, **changes)
    job.ready()
    job.to_the_end()
    assert job.announced() == list(range(7))
    assert job.counts() == {"issued": 48, "trained": 48}
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5, 6]
    if not changes:
        assert digests(job) == digests(undisturbed)
        # What the rollouts were written with may differ: it is the newest that was out by then.
        names = ("step", "policy_version", "loss", "grad_norm", "lr", "tokens", "rollouts")
        mine, others = (
            [[row[n] for n in names] for row in one.rows()] for one in (job, undisturbed)
        )
        assert mine == others
    reader = PolicyFetcher(DirectoryReader(job.trainer.directory.path), deltas=True)
    announced = job.bus.state.announced_policies()
    for policy in announced[-1:] if changes else announced:
        assert reader.fetch(policy).digest == policy.digest


def test_weights_go_through_redis_in_the_background_too(
    run: Callable[..., Run], late: None
) -> None:
    job = run(weights__transport="redis")
    job.ready()
    job.to_the_end()
    policy = job.bus.state.newest_policy()
    assert policy is not None and policy.number == 6
    assert PolicyFetcher(ChunkReader(job.bus.weights), deltas=True).fetch(policy).number == 6


@pytest.mark.parametrize("changes", [{}, {"trainer__lora__rank": 4}])
def test_a_recorded_run_whose_versions_are_late_replays_to_the_same_bits(
    run: Callable[..., Run], late: None, changes: dict[str, Any]
) -> None:
    job = run(trainer__record=True, **changes)
    job.ready()
    job.until(3)
    # A killed process leaves no thread, which would write here under its successor's process id.
    job.trainer.output.complete()
    job.start()
    job.to_the_end()
    job.trainer.recording.sync()
    assert_replays(job)


def test_the_optimizer_waits_until_the_weights_are_copied(
    run: Callable[..., Run],
    undisturbed: Run,
    in_background: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    copy = packer.serialised
    wait = Publication.wait_until_copied

    def copied(*args: Any) -> Any:
        gate.passes()  # only once the next step is at its update
        return copy(*args)

    def waiting(publication: Publication) -> None:
        gate.open()
        wait(publication)

    job = run()
    job.ready()
    monkeypatch.setattr(packer, "serialised", copied)
    monkeypatch.setattr(Publication, "wait_until_copied", waiting)
    job.until(2)
    monkeypatch.undo()
    job.to_the_end()
    assert digests(job) == digests(undisturbed)


@pytest.mark.parametrize(
    "killed_at", ["serialised", "write_weights", "sync", "_discard", "announce", "prune"]
)
def test_a_kill_between_any_two_stages_of_a_late_version_is_made_good(
    run: Callable[..., Run],
    undisturbed: Run,
    late: None,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: str,
) -> None:
    job = run()
    job.ready()
    job.until(2)
    job.trainer.output.complete()
    owner: Any = {"serialised": packer, "announce": job.bus.lease}.get(killed_at, directory_store)
    if killed_at == "prune":
        owner = publisher.weights
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, killed_at, killed)
        job.until(4)
        job.turn(2)
    assert (3 in job.announced()) == (killed_at == "prune")
    job.start()
    job.to_the_end()
    assert digests(job) == digests(undisturbed)
    assert job.counts() == {"issued": 48, "trained": 48}
    left = {path.name[0] for path in (job.trainer.directory.path / "policies").iterdir()}
    assert left == {"0"}


def test_a_disk_that_is_full_in_the_background_stops_the_trainer_with_the_reason(
    run: Callable[..., Run], late: None, undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = run()
    job.ready()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
        patch.setattr(directory_store, "write_weights", full)
        job.to_the_end()
    assert job.announced() == [0]
    job.start()
    job.to_the_end()
    assert digests(job) == digests(undisturbed)


def test_a_trainer_that_is_superseded_while_it_publishes_makes_nothing_visible(
    run: Callable[..., Run], in_background: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    write = directory_store.write_weights

    def slow(*args: Any) -> None:
        write(*args)
        gate.passes()

    job = run()
    job.ready()
    monkeypatch.setattr(directory_store, "write_weights", slow)
    job.until(1)
    old = job.trainer
    assert gate.reached.wait(LONGEST_S)
    monkeypatch.undo()
    job.start()
    before = (job.announced(), list((old.directory.path / "policies").glob("[0-9]*")))
    gate.open()
    with pytest.raises(LeaseLost):
        old.output.complete()
    assert (job.announced(), list((old.directory.path / "policies").glob("[0-9]*"))) == before
    job.to_the_end()
    assert job.announced() == list(range(7))


def test_a_step_says_how_long_it_waited_and_how_long_publishing_took(
    run: Callable[..., Run], late: None
) -> None:
    job = run()
    job.ready()
    job.to_the_end()
    for row in job.rows():
        assert 0 <= row["publish_wait_s"] <= row["step_s"]
        assert row["publish_s"] > 0 and row["tokens_per_s"] > 0


def test_a_trainer_that_drains_waits_for_the_version_on_its_way(
    run: Callable[..., Run], late: None
) -> None:
    job = run()
    job.ready()
    job.until(1)
    assert job.trainer.output.pending
    job.trainer.close()
    assert job.announced() == [0, 1]
    assert job.checkpoints() == ["step-000001"]


POLICY = PolicyVersion(1, "digest", "policies/000001", 1)


def test_the_main_thread_is_woken_a_few_times() -> None:
    woken = threading.Event()

    publication = Publication(lambda copied: POLICY, woken.set)
    assert woken.wait(LONGEST_S)
    assert publication.done and publication.result() == POLICY
    calls = list[float]()
    ended = threading.Event()

    def count() -> None:
        calls.append(0)
        if len(calls) == len(WAKES_S):
            ended.set()

    Publication(lambda copied: POLICY, count)
    assert ended.wait(LONGEST_S)


def test_each_phase_of_a_slice_may_take_max_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    loop = LoopState("train", True, stats)
    heart = Heartbeat(None, loop, DeliverySettings(max_handle=100), None)  # type: ignore[arg-type]
    ends = list[int]()
    monkeypatch.setattr("os._exit", ends.append)
    loop.slice_since = 0.0
    stats.phase_since = 90.0
    heart._exit_if_stuck(180.0)
    assert ends == []
    heart._exit_if_stuck(191.0)
    assert ends == [4]


def test_tied_weights_and_buffers_are_copied_as_they_are_in_the_foreground() -> None:
    shared = torch.ones(4, 4)
    state = {"embed": shared, "head": shared, "buffer": torch.arange(3.0)}
    data = packer.serialised(state, torch.bfloat16, None)
    policy = publisher.LoadedPolicy(1, None, data)
    assert sorted(policy.tensors()) == ["buffer", "embed"]
