"""Whatever the transport and whatever happens to the reader, what it loads is bit for bit what was
published.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import (
    LoadedPolicy,
    PolicyFetcher,
    VersionId,
    WeightsError,
    announced,
)
from tests.pipeline.weights.policies import Transport, course

UPDATES = 50


def fetched(reader: PolicyFetcher, policy: LoadedPolicy) -> LoadedPolicy:
    found = reader.fetch(announced(policy))
    assert (found.number, found.digest) == (policy.number, policy.digest)
    assert np.array_equal(found.data, policy.data)
    return found


@pytest.mark.parametrize("full_every", [None, 10], ids=["full sets", "deltas"])
def test_over_50_updates_readers_that_keep_up_miss_some_or_join_late_get_every_bit(
    transport: Transport,
    full_every: int | None,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    sender = transport.sender(full_every)
    steady = transport.reader()
    dropping = transport.reader()
    sizes = []
    shares = []
    full_bytes = 0
    for policy in course(UPDATES + 1):
        sent = sender.send(policy)
        tensors = fetched(steady, policy).tensors()
        assert tensors["embed"].dtype == torch.bfloat16
        assert steady.fetched_bytes == sent.update_bytes
        if policy.number % 7 not in (3, 4) or policy.number == UPDATES:
            fetched(dropping, policy)
        if policy.number in (1, 9, 10, 11, 29, UPDATES):
            fetched(transport.reader(), policy)
        full_bytes = policy.data.size
        sizes.append(sent.update_bytes)
        shares.append(sent.changed_share)
    mean = sum(sizes[1:]) / UPDATES
    record_testsuite_property(f"{transport.name}, {full_every}: bytes an update", mean)
    print(
        f"{transport.name}, full_every={full_every}: {mean:,.0f} bytes an update, a full set has "
        f"{full_bytes:,}"
    )
    if full_every is None:
        assert (set(sizes), set(shares)) == ({full_bytes}, {None})
    else:
        assert mean < 0.3 * full_bytes
        assert all(share is not None and 0 < share < 0.1 for share in shares[1:])


def test_weights_that_change_everywhere_go_whole(transport: Transport) -> None:
    sender = transport.sender()
    reader = transport.reader()
    for policy in course(4, dtype=torch.float32):
        sent = sender.send(policy)
        assert sent.update_bytes == policy.data.size
        fetched(reader, policy)
        assert all(part.base is None for part in transport.store_reader().parts())


def test_only_the_newest_full_set_and_the_deltas_since_are_offered(transport: Transport) -> None:
    sender = transport.sender(full_every=4)
    for policy in course(7):
        sender.send(policy)
    found = {(part.number, part.base is not None) for part in transport.store_reader().parts()}
    if transport.name == "filesystem":
        found -= {
            (0, False)
        }  # what else becomes of model directories is not the transport's to say
    assert found == {(4, False), (4, True), (5, True), (6, True)}


def test_deltas_that_have_come_to_the_size_of_a_full_set_are_followed_by_one(
    transport: Transport,
) -> None:
    sender = transport.sender(full_every=10**6)
    since = 0
    most = 0.0
    for policy in course(30, rate=1e-3):
        sent = sender.send(policy)
        parts = transport.store_reader().parts()
        newest_full = max(part.number for part in parts if part.base is None)
        since = sum(part.size_bytes for part in parts if part.base and part.number > newest_full)
        most = max(most, since / policy.data.size)
        assert sent.changed_share is None or sent.changed_share < 0.5
    assert 0.5 < most < 1


def test_a_reader_without_the_base_starts_from_the_full_set_and_the_deltas_that_follow(
    transport: Transport,
) -> None:
    policies = list(course(4))
    sender = transport.sender()
    for policy in policies:
        sender.send(policy)
    late = transport.reader()
    fetched(late, policies[-1])
    deltas = sum(
        part.size_bytes
        for part in transport.store_reader().parts()
        if part.base and part.number > 0
    )
    assert late.fetched_bytes == policies[0].data.size + deltas


def test_what_a_reader_has_already_is_not_read_again(transport: Transport) -> None:
    policies = list(course(2))
    sender = transport.sender()
    reader = transport.reader()
    for policy in policies:
        sender.send(policy)
    assert reader.fetch(announced(policies[1])) is reader.fetch(announced(policies[1]))


def test_a_version_that_was_taken_back_is_not_loaded_and_what_replaced_it_is(
    transport: Transport,
) -> None:
    old = list(course(8))
    other = list(course(8, seed=1))
    sender = transport.sender()
    reader = transport.reader()
    for policy in old:
        sender.send(policy)
    fetched(reader, old[7])
    after = (
        transport.sender()
    )  # a trainer that fell back to version 4, and went another way from there
    after.skip(old[4])
    replaced = LoadedPolicy.of(5, other[5].tensors())
    after.send(replaced)
    fetched(reader, replaced)
    fetched(transport.reader(), replaced)
    for gone in old[5:]:
        with pytest.raises(WeightsError):
            transport.reader().fetch(announced(gone))


def test_a_trainer_that_starts_anew_goes_on_with_deltas_where_they_lead_somewhere(
    transport: Transport,
) -> None:
    policies = list(course(5))
    sender = transport.sender()
    reader = transport.reader()
    for policy in policies[:3]:
        sender.send(policy)
    fetched(reader, policies[2])
    anew = transport.sender()
    assert anew.offers(VersionId(2, policies[2].digest))
    anew.skip(policies[2])
    sent = anew.send(policies[3])
    assert sent.update_bytes < 0.3 * policies[3].data.size
    fetched(reader, policies[3])
    blind = transport.sender()  # and without a base it sends everything
    assert blind.send(policies[4]).update_bytes == policies[4].data.size
    fetched(reader, policies[4])


def test_a_delta_that_is_damaged_is_not_loaded_and_the_base_stays_what_it_was(
    transport: Transport,
) -> None:
    policies = list(course(3))
    sender = transport.sender()
    reader = transport.reader()
    sender.send(policies[0])
    sender.send(policies[1])
    base = fetched(reader, policies[1])
    before = base.data.copy()
    sender.send(policies[2])
    delta = next(part for part in transport.store_reader().parts() if part.number == 2)
    good = transport.store_reader().read(delta)
    for at in (delta.size_bytes - 1, delta.size_bytes // 2, 3):
        bad = good.copy()
        bad[at] ^= 1
        store(transport, delta.place, bad.tobytes())
        with pytest.raises(WeightsError):
            reader.fetch(announced(policies[2]))
        assert np.array_equal(base.data, before)
    store(transport, delta.place, good.tobytes())
    fetched(reader, policies[2])


def store(transport: Transport, place: str, data: bytes) -> None:
    """Put `data` in the place of a part of a single chunk."""
    if transport.name == "filesystem":
        (transport.run_dir / place).write_bytes(data)
    else:
        transport.bus.connection.ask("HSET", transport.bus.keys.weight_chunks(place), 0, data)


READER = """
import sys
from pathlib import Path
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher
from onstream.pipeline.weights.redis_store import ChunkReader

name, run_dir, url, run = sys.argv[1:]
bus = Bus.connect(url, run, consumer="killed", block_s=0.2, connect_timeout_s=5)
reader = PolicyFetcher(
    ChunkReader(bus.weights) if name == "redis" else DirectoryReader(Path(run_dir)), deltas=True
)
for line in sys.stdin:
    number, digest = line.split()
    loaded = reader.fetch(PolicyVersion(int(number), digest, f"policies/{int(number):06d}", 0))
    print(loaded.number, loaded.digest, reader.fetched_bytes, flush=True)
"""


def test_readers_that_are_killed_leave_nothing_wrong_and_their_successors_load_the_newest(
    transport: Transport, redis_url: str
) -> None:
    command = [
        sys.executable,
        "-c",
        READER,
        transport.name,
        str(transport.run_dir),
        redis_url,
        transport.bus.run,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    sender = transport.sender()
    steady = transport.reader()
    process: subprocess.Popen[str] | None = None
    for policy in course(UPDATES + 1):
        sender.send(policy)
        fetched(steady, policy)
        if process is None:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert process.stdin and process.stdout
        process.stdin.write(f"{policy.number} {policy.digest}\n")
        process.stdin.flush()
        if policy.number in (
            13,
            37,
        ):  # in the middle of its reading, or just before or after: all the same
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()
            process = None
        else:
            number, digest, size = process.stdout.readline().split()
            assert (int(number), digest) == (policy.number, policy.digest)
            if policy.number in (
                14,
                38,
            ):  # with nothing in memory it read the full set and what followed
                assert int(size) > policy.data.size
    assert process and process.stdin and process.stdout
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def test_announcements_name_the_digest_of_the_whole_weights(tmp_path: Path) -> None:
    policy = next(course(1))
    assert announced(policy) == PolicyVersion(0, policy.digest, "policies/000000", policy.data.size)
