"""What the trainer publishes of a bfloat16 policy, by both transports, also when it was killed and
replays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import onstream.pipeline.weights.redis_store
from onstream.pipeline.record_codec import decode_policy, encode
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import (
    DirectoryReader,
    LoadedPolicy,
    PolicyFetcher,
    StoreReader,
    WeightsError,
)
from onstream.pipeline.weights.redis_store import ChunkReader
from onstream.workers.trainer.publication import publisher
from tests.workers.trainer.driver import Run

CHANGES = {
    "weights__delta": True,
    "weights__full_every": 4,
    "trainer__dtype": "bfloat16",
    "trainer__optim__lr": 1e-5,
    "trainer__optim__warmup": 0,
}


def store_reader(job: Run) -> StoreReader:
    return (
        ChunkReader(job.bus.weights)
        if job.settings().weights.transport == "redis"
        else DirectoryReader(job.trainer.directory.path)
    )


def directories(job: Run) -> list[str]:
    return sorted(path.name for path in (job.trainer.directory.path / "policies").glob("[0-9]*"))


@pytest.fixture(params=["filesystem", "redis"])
def job(request: pytest.FixtureRequest, run: Callable[..., Run]) -> Run:
    job = run(weights__transport=request.param, **CHANGES)
    job.ready()
    return job


def test_a_step_says_how_many_bytes_it_published_and_what_share_of_the_weights_changed(
    job: Run,
) -> None:
    job.to_the_end()
    rows = job.rows()
    full = job.bus.state.newest_policy().size_bytes  # type: ignore[union-attr]
    assert all(0 < row["publish_bytes"] < full for row in rows)
    assert all(0 < row["delta_share"] < 0.5 for row in rows)


def test_every_version_can_be_had_by_a_reader_that_keeps_up_and_the_newest_by_one_that_joins(
    job: Run,
) -> None:
    steady = PolicyFetcher(store_reader(job), deltas=True)
    for step in range(7):
        job.until(step)
        policy = job.bus.state.newest_policy()
        assert policy is not None and policy.number == step
        for reader in (steady, PolicyFetcher(store_reader(job), deltas=True)):
            assert reader.fetch(policy).digest == policy.digest


def test_model_directories_are_the_first_every_fourth_and_the_last(job: Run) -> None:
    job.to_the_end()
    assert directories(job) == ["000000", "000004", "000006"]


@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_killed_trainer_replays_without_publishing_anew_and_goes_on_where_it_was(
    job: Run, killed_at: int
) -> None:
    job.until(killed_at)
    before = {part.place for part in store_reader(job).parts()}
    rows = job.rows()
    newest = job.bus.state.newest_policy()
    assert newest is not None
    job.start()
    assert {part.place for part in store_reader(job).parts()} == before
    job.until(killed_at)
    assert {part.place for part in store_reader(job).parts()} == before
    assert job.bus.state.newest_policy() == newest
    assert job.rows()[-1]["publish_bytes"] == 0
    assert [row["delta_share"] for row in job.rows()] == [row["delta_share"] for row in rows]
    reader = PolicyFetcher(store_reader(job), deltas=True)
    reader.fetch(newest)
    job.to_the_end()
    policy = job.bus.state.newest_policy()
    assert policy is not None
    assert reader.fetch(policy).digest == policy.digest
    assert job.announced() == list(range(7))


def test_a_run_that_an_earlier_version_began_resumes_and_announces_its_versions_anew(
    run: Callable[..., Run],
) -> None:
    """Until the digest was a tree over the tensors, it was the SHA-256 of the version's file."""
    job = run(checkpoint__keep_policies=9)
    job.ready()
    job.until(5)
    directory = job.trainer.directory.path
    for policy in job.bus.state.announced_policies():
        weights = directory / policy.path / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        job.bus.lease.announce(job.trainer.lease, replace(policy, digest=digest))
    before = job.bus.state.newest_policy()
    assert before is not None and before.number == 5
    with pytest.raises(WeightsError, match="earlier versions of Onstream"):
        PolicyFetcher(DirectoryReader(directory), deltas=False).fetch(before)
    job.start()
    policy = job.bus.state.newest_policy()
    assert policy is not None and policy.number == 4
    assert PolicyFetcher(DirectoryReader(directory), deltas=False).fetch(policy).number == 4
    job.to_the_end()
    last = job.bus.state.newest_policy()
    assert last is not None and last.digest.endswith("-tree1")


def test_weights_that_redis_lost_with_everything_else_are_published_again(
    run: Callable[..., Run],
) -> None:
    job = run(weights__transport="redis", **CHANGES)
    job.ready()
    job.until(5)
    job.lose_redis()
    policy = job.bus.state.newest_policy()
    assert policy is None
    job.bus.connection.create_groups()
    job.start()
    policy = job.bus.state.newest_policy()
    assert policy is not None and policy.number == 4
    assert (
        PolicyFetcher(ChunkReader(job.bus.weights), deltas=True).fetch(policy).digest
        == policy.digest
    )


def test_weights_that_redis_lost_under_a_trainer_at_work_are_given_again(
    run: Callable[..., Run],
) -> None:
    job = run(weights__transport="redis", **CHANGES)
    job.ready()
    job.until(3)
    job.lose_redis()
    job.bus.lease.renew_from_heartbeat(
        job.trainer.lease
    )  # as the trainer's second thread does every second
    job.ready()
    job.turn(2)
    policy = job.bus.state.newest_policy()
    assert policy is not None and policy.number == 3
    assert (
        PolicyFetcher(ChunkReader(job.bus.weights), deltas=True).fetch(policy).digest
        == policy.digest
    )
    job.to_the_end()


def test_weights_that_redis_lost_while_they_were_written_are_written_again(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onstream.pipeline.weights.redis_store, "CHUNK_BYTES", 2048)
    job = run(weights__transport="redis", **CHANGES | {"weights__delta": False})
    job.ready()
    job.until(2)
    keep_chunk = job.bus.weights.write_chunk
    kept = []

    def lose_the_third(*args: Any) -> None:
        kept.append(args[2])
        if len(kept) == 3:
            job.lose_redis()
        keep_chunk(*args)

    monkeypatch.setattr(job.bus.weights, "write_chunk", lose_the_third)
    job.until(3)
    assert kept.count(0) == 2
    policy = job.bus.state.newest_policy()
    assert policy is not None and policy.number == 3
    assert (
        PolicyFetcher(ChunkReader(job.bus.weights), deltas=True).fetch(policy).digest
        == policy.digest
    )
    job.ready()
    job.to_the_end()


def test_a_missing_version_is_named_with_the_place_where_it_should_be(
    bus: Bus, run: Callable[..., Run], tmp_path: Path
) -> None:
    job = run(weights__transport="redis", **CHANGES)
    policy: Any = job.bus.state.newest_policy()
    with pytest.raises(
        WeightsError, match=r"no weights of version 0, digest [0-9a-f]{12}, in .*elsewhere"
    ):
        PolicyFetcher(DirectoryReader(tmp_path / "elsewhere"), deltas=True).fetch(policy)


class Sends:
    """Stands for a transfer between GPUs, which there are none of: it succeeds but for the versions
    that `fails`.
    """

    def __init__(self) -> None:
        self.fails: set[int] = set()
        self.sent: list[int] = []

    def send(self, policy: LoadedPolicy) -> bool:
        self.sent.append(policy.number)
        return policy.number not in self.fails

    def close(self) -> None:
        """Nothing was opened."""


@pytest.fixture
def sends(monkeypatch: pytest.MonkeyPatch) -> Sends:
    sends = Sends()
    monkeypatch.setattr("onstream.workers.trainer.startup.nccl_transfer", lambda *_: sends)
    return sends


@pytest.fixture
def direct(run: Callable[..., Run], sends: Sends) -> Run:
    job = run(weights__transport="nccl", weights__full_every=4)
    job.ready()
    return job


def readable(job: Run) -> bool:
    policy = job.bus.state.newest_policy()
    assert policy is not None
    try:
        return (
            PolicyFetcher(DirectoryReader(job.trainer.directory.path), deltas=False)
            .fetch(policy)
            .number
            == policy.number
        )
    except WeightsError:
        return False


def test_what_went_from_gpu_to_gpu_is_no_file_but_for_every_fourth_and_the_last(
    direct: Run, sends: Sends
) -> None:
    direct.to_the_end()
    assert sends.sent == list(range(7))
    assert directories(direct) == ["000000", "000004", "000006"]
    assert direct.announced() == list(range(7))


def test_a_version_whose_transfer_failed_is_a_file_when_it_is_announced(
    direct: Run, sends: Sends
) -> None:
    sends.fails = {2}
    for step, there in ((1, False), (2, True), (3, False)):
        direct.until(step)
        assert readable(direct) == there


def test_a_generator_that_missed_the_newest_version_gets_it_as_a_file(direct: Run) -> None:
    direct.until(3)
    policy = direct.bus.state.newest_policy()
    assert policy is not None and not readable(direct)
    direct.turn()
    assert not readable(direct)
    direct.bus.transfer.request_file(policy.digest)
    direct.turn()
    assert readable(direct)


def test_a_trainer_that_was_killed_sends_the_newest_version_again_and_announces_it_once(
    direct: Run, sends: Sends
) -> None:
    direct.until(5)
    sends.sent.clear()
    direct.start()
    direct.until(5)
    assert sends.sent == [5]
    direct.to_the_end()
    assert direct.announced() == list(range(7))


def test_a_key_of_the_newest_version_that_was_overwritten_or_deleted_is_mended(
    run: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "MEND_S", 0.0)
    job = run(trainer__max_steps=3)
    job.ready()
    job.until(2)
    key = bus.keys.policy
    whole = bus.connection.ask("GET", key)
    newest = decode_policy(whole)
    forged = replace(newest, number=10**12)
    for value in (b"\xc1 garbage", encode(forged), encode(replace(newest, digest="other"))):
        bus.connection.ask("SET", key, value)
        job.turn()
        assert bus.connection.ask("GET", key) == whole
    bus.connection.ask("DEL", key)
    job.turn()
    assert bus.connection.ask("GET", key) == whole
    job.to_the_end()
    assert job.counts() == {"issued": 24, "trained": 24}
