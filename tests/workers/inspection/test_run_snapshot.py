"""A run as Redis shows it, and what it waits for."""

from __future__ import annotations

import pytest

from onstream.pipeline.records import PolicyVersion, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.workers.inspection.run_snapshot import RunSnapshot, take_snapshot, waits

STAGES = ("generate", "verify", "train")
ALL = frozenset(STAGES)
ONE_EACH = dict.fromkeys(STAGES, 1)


def test_a_snapshot_holds_what_redis_says(bus: Bus) -> None:
    lease = bus.lease.acquire(5)
    ticket = Ticket(
        number=1, group=0, group_size=1, index=0, seed=0, min_policy_version=0, route=["train"]
    )
    bus.lease.issue(lease, 0, [ticket], 100)
    bus.lease.announce(
        lease, PolicyVersion(number=3, digest="d", path="policies/000003", size_bytes=1)
    )
    bus.state.mark_ready("generate")
    bus.state.write_heartbeat("generate", Stats(detail="loading the weights"), state="starting")
    snapshot = take_snapshot(bus.state)
    assert snapshot.ready == {"generate"}
    assert snapshot.backlog == {"generate": 1, "act": 0, "verify": 0, "score": 0, "train": 0}
    assert snapshot.version == 3
    assert snapshot.in_hand == {"generate": 0, "act": 0, "verify": 0, "score": 0, "train": 0}
    assert snapshot.workers == {"generate": ["loading the weights"]}
    assert snapshot.taking == {}
    assert not snapshot.finished


def held_up(details: list[str], backlog: int = 9) -> RunSnapshot:
    """A run whose workers of one stage say `details`."""
    return RunSnapshot(
        ready=ALL, taking=ONE_EACH, workers={"verify": details}, backlog={"verify": backlog}
    )


@pytest.mark.parametrize(
    ("snapshot", "started", "expected"),
    [
        (
            RunSnapshot(
                ready=ALL,
                taking=ONE_EACH,
                workers={stage: [""] for stage in STAGES},
                backlog={"verify": 900},
            ),
            {},
            [],
        ),
        (
            RunSnapshot(
                ready=ALL, workers={"generate": [""], "train": [""]}, backlog={"verify": 900}
            ),
            {},
            [
                "verify: 900 records wait and no worker takes them; "
                "start one with `onstream worker verifier`"
            ],
        ),
        (
            RunSnapshot(
                ready=ALL,
                taking={"generate": 1, "train": 1},
                workers={"verify": ["loading"]},
                backlog={"verify": 900},
            ),
            {"verify": 1},
            ["verify: 900 records wait and no worker takes them; one is starting"],
        ),
        (
            RunSnapshot(
                ready=frozenset({"generate"}), workers={"train": ["loading the optimizer"]}
            ),
            {"train": 1},
            [
                "verify: not ready: no worker; start one with `onstream worker verifier`",
                "train: not ready: loading the optimizer",
            ],
        ),
        (
            RunSnapshot(ready=frozenset({"generate", "train"})),
            {"verify": 2},
            ["verify: not ready: starting"],
        ),
        (
            RunSnapshot(),
            {"generate": 1, "verify": 1, "train": 1},
            ["generate, verify, train: not ready: starting"],
        ),
        (
            held_up(["waiting for the teacher: http://t/v1: ConnectError"]),
            {},
            ["verify: waiting for the teacher: http://t/v1: ConnectError"],
        ),
        (held_up(["waiting for the teacher", ""]), {}, []),
        (held_up(["waits for policy version 3; 2 is the newest announced"]), {}, []),
        (held_up(["waiting for the teacher"], backlog=0), {}, []),
    ],
)
def test_what_a_run_waits_for_is_named(
    snapshot: RunSnapshot, started: dict[str, int], expected: list[str]
) -> None:
    assert waits(snapshot, STAGES, started) == expected
