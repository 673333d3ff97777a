"""Weights in Redis keep within their bound, leave nothing behind, and are never seen by halves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import onstream.pipeline.weights.redis_store
from onstream.pipeline.errors import LeaseLost, UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import (
    LoadedPolicy,
    PolicyFetcher,
    PolicySender,
    WeightsError,
    announced,
)
from onstream.pipeline.weights.redis_store import CHUNK_BYTES, ChunkReader, ChunkWriter
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.pipeline.weights.policies import course

SMALL_MB = 64


@pytest.fixture(scope="module")
def small_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with little memory."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("small"), max_memory_mb=SMALL_MB)
    yield server.start()
    server.stop()


@pytest.fixture
def small(small_url: str, run_name: str) -> Iterator[Bus]:
    bus = Bus.connect(small_url, run_name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.connection.client.flushall()
    bus.close()


def outlet(bus: Bus, share: float = 0.5, patience_s: float = 0.3) -> ChunkWriter:
    return ChunkWriter(bus.weights, bus.lease.current or bus.lease.acquire(5), share, patience_s)


def policy_of(number: int, mib: float) -> LoadedPolicy:
    return LoadedPolicy.of(number, {"w": torch.full((int(mib * (1 << 18)),), float(number))})


def chunk_keys(bus: Bus) -> set[str]:
    return {
        key.decode().rpartition(":")[2]
        for key in bus.connection.client.keys(f"{{onstream:{bus.run}}}:weights:0*")
    }


def test_a_policy_of_several_chunks_arrives_whole(bus: Bus) -> None:
    policy = policy_of(0, 3.3)
    PolicySender(outlet(bus), None).send(policy)
    assert (
        bus.connection.client.hlen(bus.keys.weight_chunks(f"000000-{policy.digest[:16]}-full"))
        == -(-policy.data.size // CHUNK_BYTES)
        == 4
    )
    assert np.array_equal(
        PolicyFetcher(ChunkReader(bus.weights), deltas=False).fetch(announced(policy)).data,
        policy.data,
    )


def test_what_is_not_finished_is_not_seen(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    old = policy_of(0, 2.5)
    new = policy_of(1, 2.5)
    sender = PolicySender(outlet(bus), None)
    sender.send(old)
    seen = []
    keep_chunk = bus.weights.write_chunk

    def noted(*args: object) -> None:
        keep_chunk(*args)  # type: ignore[arg-type]
        seen.append([part.number for part in ChunkReader(bus.weights).parts()])

    monkeypatch.setattr(bus.weights, "write_chunk", noted)
    sender.send(new)
    assert seen == [[0], [0], [0]]
    assert [part.number for part in ChunkReader(bus.weights).parts()] == [1]


def test_only_what_is_offered_takes_memory_and_what_a_killed_trainer_left_goes(bus: Bus) -> None:
    first, second, third = (policy_of(number, 1.5) for number in range(3))
    sender = PolicySender(outlet(bus), None)
    sender.send(first)
    sender.send(second)
    assert chunk_keys(bus) == {f"000001-{second.digest[:16]}-full"}
    dying = outlet(bus)
    dying.put_whole(third)  # and is killed before it offers them
    assert len(chunk_keys(bus)) == 2
    outlet(bus)
    assert chunk_keys(bus) == {f"000001-{second.digest[:16]}-full"}
    assert {
        place.decode() for place in bus.connection.client.smembers(bus.keys.weight_places)
    } == chunk_keys(bus)


def test_weights_that_are_removed_while_they_are_read_are_not_loaded_and_the_newest_are(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = policy_of(0, 2.5)
    new = policy_of(1, 2.5)
    sender = PolicySender(outlet(bus), None)
    reader = PolicyFetcher(ChunkReader(bus.weights), deltas=False)
    sender.send(old)
    weight_chunk = bus.weights.read_chunk
    asked = []

    def replaced_meanwhile(place: str, index: int) -> bytes | None:
        asked.append(index)
        if len(asked) == 2:
            sender.send(new)
        return weight_chunk(place, index)

    monkeypatch.setattr(bus.weights, "read_chunk", replaced_meanwhile)
    with pytest.raises(WeightsError, match="version 0 was removed from Redis while it was read"):
        reader.fetch(announced(old))
    assert np.array_equal(reader.fetch(announced(new)).data, new.data)


def test_a_trainer_that_was_replaced_writes_no_weights(bus: Bus, redis_url: str) -> None:
    old = PolicySender(outlet(bus), None)
    old.send(policy_of(0, 0.1))
    bus.connection.client.delete(bus.keys.lease)
    other = Bus.connect(redis_url, bus.run, consumer="other", block_s=0.2, connect_timeout_s=5)
    newer = PolicySender(outlet(other), None)
    with pytest.raises(LeaseLost):
        old.send(policy_of(1, 0.1))
    newer.send(policy_of(2, 0.1))
    assert [part.number for part in ChunkReader(bus.weights).parts()] == [2]
    other.close()


def test_weights_that_are_larger_than_their_share_are_refused_with_both_numbers(small: Bus) -> None:
    with pytest.raises(
        UserError, match=r"policy version 3 has 20 MiB; weights may take 16 MiB of Redis's memory"
    ):
        PolicySender(outlet(small, share=0.25), None).send(policy_of(3, 20))


def test_the_old_weights_go_first_where_both_have_no_room(
    small: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = PolicySender(outlet(small, share=0.5), None)
    sender.send(policy_of(0, 20))
    seen = []
    keep_chunk = small.weights.write_chunk

    def noted(*args: object) -> None:
        seen.append([part.number for part in ChunkReader(small.weights).parts()])
        keep_chunk(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(small.weights, "write_chunk", noted)
    sender.send(policy_of(1, 20))
    assert seen[0] == []
    assert [part.number for part in ChunkReader(small.weights).parts()] == [1]
    assert small.connection.client.info("memory")["used_memory"] < 0.5 * (SMALL_MB << 20)


def test_over_many_versions_weights_stay_within_their_share(
    small: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onstream.pipeline.weights.redis_store, "CHUNK_BYTES", 4096)
    share = 0.005  # 336 kB: five times a full set
    sender = PolicySender(outlet(small, share), 10)
    most = 0
    for policy in course(40, rate=3e-3):
        sender.send(policy)
        held = sum(part.size_bytes for part in ChunkReader(small.weights).parts())
        stored = sum(
            small.connection.client.memory_usage(key, samples=0)
            for key in small.connection.client.keys(f"{{onstream:{small.run}}}:weights:0*")
        )
        most = max(most, held)
        assert stored < 1.3 * held + 4096
    assert most <= share * (SMALL_MB << 20)
    assert most > 70_000  # it did hold deltas beside the full set


def test_a_delta_that_has_no_room_beside_its_full_set_is_not_sent(small: Bus) -> None:
    share = 64_000 / (SMALL_MB << 20)  # one full set, and hardly more
    sender = PolicySender(outlet(small, share), 10**6)
    for policy in course(3):
        sent = sender.send(policy)
        assert sent.update_bytes == policy.data.size
        assert np.array_equal(
            PolicyFetcher(ChunkReader(small.weights), deltas=True).fetch(announced(policy)).data,
            policy.data,
        )


def test_a_redis_that_the_records_have_filled_is_waited_for_and_then_told_about(small: Bus) -> None:
    sender = PolicySender(outlet(small, share=0.5, patience_s=0.3), None)
    for index in range(SMALL_MB):
        try:
            small.connection.client.set(f"filler-{index}", b"x" * (1 << 20))
        except Exception:
            break
    with pytest.raises(
        UserError, match=r"Redis stayed full for 0.3 s while policy version 0 was written"
    ):
        sender.send(policy_of(0, 8))
    small.connection.client.delete(*small.connection.client.keys("filler-*"))
    sender.send(policy_of(0, 8))
    assert [part.number for part in ChunkReader(small.weights).parts()] == [0]


def test_the_run_directory_has_no_part_in_it(bus: Bus, tmp_path: Path) -> None:
    policies = list(course(3))
    sender = PolicySender(outlet(bus), 10)
    reader = PolicyFetcher(ChunkReader(bus.weights), deltas=True)
    for policy in policies:
        sender.send(policy)
        assert reader.fetch(announced(policy)).digest == policy.digest
    assert list(tmp_path.iterdir()) == []
