"""A trainer at work whose Redis is restarted, emptied, replaced by a replica that lags, or full: it
goes on, and nothing is lost.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onstream.pipeline.errors import LeaseLost
from onstream.pipeline.redis.bus import Bus
from onstream.settings.plan import make_plan
from onstream.settings.stages import StageName
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.redis_servers import Pair
from tests.workers.trainer.driver import Run


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A Redis that a test may kill and fill."""
    server = EmbeddedRedis(tmp_path / "redis", max_memory_mb=64)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own(server: EmbeddedRedis, run_name: str) -> Iterator[Bus]:
    """A bus on that Redis."""
    bus = Bus.connect(server.url, run_name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()


def beat(job: Run) -> None:
    """What the trainer's second thread does every second, and what a worker's heartbeat brings."""
    job.bus.lease.renew_from_heartbeat(job.trainer.lease)
    job.ready()


def wait_until_written(bus: Bus) -> None:
    """Wait until the append-only file has it all: while the disk is busy, Redis keeps it back."""
    while bus.connection.ask("INFO", "persistence")["aof_buffer_length"]:
        pass


def test_a_trainer_whose_redis_is_emptied_under_it_asks_again_for_what_is_lost_and_goes_on(
    run: Callable[..., Run], bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run()
    job.ready()
    job.until(3)
    job.answer(count=3)
    job.turn()
    epoch = job.trainer.lease.epoch
    held = len(job.trainer.training.batches.numbers)
    issued = bus.state.issued()
    job.lose_redis()
    beat(job)
    job.turn(3)
    said = capsys.readouterr().out
    lost = issued - 24 - held
    assert (
        "redis has lost its data, the lease with it" in said
        and f"count={lost}" in said
        and lost > 0
    )
    assert job.trainer.lease.epoch == epoch + 1 and bus.state.issued() >= issued
    policy = bus.state.newest_policy()
    assert (
        policy is not None
        and policy.number == 3
        and bus.state.plan() == make_plan(job.settings()).encode()
    )
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5, 6]


def test_data_lost_in_the_middle_of_a_step_is_restored_by_the_call_that_finds_it(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(2)
    publish = job.trainer.publisher.publish

    def lose_first(*args: object, **kwargs: object) -> object:
        job.lose_redis()
        return publish(*args, **kwargs)  # type: ignore[arg-type]

    job.trainer.publisher.publish = lose_first  # type: ignore[method-assign, assignment]
    job.until(3)
    job.trainer.publisher.publish = publish  # type: ignore[method-assign]
    assert bus.lease.may_have_lost_data
    job.ready()
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_an_older_trainer_does_not_get_the_lease_back_when_redis_has_forgotten_its_successor(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(1)
    older = job.trainer
    stopped = job.worker
    job.start()
    job.lose_redis()
    with pytest.raises(LeaseLost, match="which was followed by 2"):
        bus.lease.renew(older.lease)
    bus.connection.create_groups()
    with pytest.raises(LeaseLost):
        stopped.turn()
    beat(job)
    job.turn()
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_successor_has_a_higher_epoch_on_an_empty_redis_too(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    epoch = job.trainer.lease.epoch
    job.lose_redis()
    job.start()
    assert job.trainer.lease.epoch == epoch + 1


def test_a_restart_on_the_same_data_is_noticed_and_costs_nothing(
    server: EmbeddedRedis, own: Bus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Run(own, model, tmp_path)
    job.ready()
    job.until(3)
    beat(job)
    assert not own.lease.may_have_lost_data
    wait_until_written(own)
    subprocess.run(["kill", "-9", str(server.pid)], check=True)
    while server.alive:
        pass
    server.start()
    beat(job)
    assert own.lease.may_have_lost_data
    job.turn()
    said = capsys.readouterr().out
    assert "looking for what it has lost" in said and "issuing them again" not in said
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    job.close_files()


def test_tickets_that_a_replica_did_not_have_when_it_took_over_are_issued_again(
    model: Path, tmp_path: Path, run_name: str
) -> None:
    with Pair(tmp_path) as pair:
        bus = Bus.connect(pair.url, run_name, consumer="tester", block_s=0.2, connect_timeout_s=5)
        job = Run(bus, model, tmp_path)
        job.ready()
        job.until(2)
        pair.cut_off_replica()
        job.until(4)
        job.answer(count=3)
        job.turn()
        issued = bus.state.issued()
        policy = bus.state.newest_policy()
        epoch = job.trainer.lease.epoch
        pair.fail_over()
        assert bus.state.issued() < issued, "the replica lags"
        beat(job)
        job.turn(3)
        assert (
            bus.state.issued() >= issued
            and bus.state.newest_policy() == policy
            and job.trainer.lease.epoch == epoch
        )
        job.to_the_end()
        assert job.counts() == {"issued": 48, "trained": 48}
        job.close_files()
        bus.close()


def test_while_redis_is_full_no_tickets_are_issued_and_the_trainer_acknowledges_early(
    server: EmbeddedRedis, own: Bus, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Run(own, model, tmp_path, checkpoint__interval=1000)
    job.ready()
    job.until(2)
    own.connection.ask("CONFIG", "SET", "maxmemory", 1)
    full_at = job.trainer.step
    while job.answer():
        job.turn(3)
    issued = own.state.issued()
    job.turn(10)
    assert own.lease.full and own.state.issued() == issued
    assert job.trainer.stats.detail == "waits for room for tickets: Redis is full"
    assert capsys.readouterr().out.count("redis is full; no tickets") == 1
    assert job.trainer.step > full_at, "what was under way is trained"
    assert own.state.numbers("train") == [], "what is settled is acknowledged, to free memory"
    for stage in ("generate", "verify"):
        fresh: StageName = stage
        own.state.mark_ready(fresh)  # a worker that starts on a full Redis says so too
    own.connection.ask("CONFIG", "SET", "maxmemory", 64 << 20)
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    job.close_files()
