"""An engine is kept at the newest version that can be loaded, and what cannot be loaded is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import (
    DirectoryReader,
    LoadedPolicy,
    PolicyFetcher,
    WeightsError,
    publish,
)
from onstream.workers.generator.policy_loader import POLL_S, RETRY_S, PolicyLoader


class Recorder:
    """An engine that notes what it is given."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, float]] = []

    @property
    def version(self) -> int:
        return self.loaded[-1][0]

    def load(self, policy: LoadedPolicy) -> None:
        if "w" not in policy.tensors():
            raise WeightsError("not of this model")
        self.loaded.append((policy.number, policy.tensors()["w"].item()))


class Watched:
    """Policies over a run directory, with a clock and an announcement that the test sets."""

    def __init__(self, run_dir: Path, receiver: Any = None) -> None:
        self.engine = Recorder()
        self.run_dir = run_dir
        self.now = 100.0
        self.looks = 0
        self.announced: PolicyVersion | None = None
        engine: Any = self.engine
        reader = PolicyFetcher(DirectoryReader(run_dir), deltas=False)
        self.policies = PolicyLoader(
            engine, reader, self._newest, clock=lambda: self.now, receiver=receiver
        )

    def publish(self, number: int, value: float, name: str = "w") -> PolicyVersion:
        model = self.run_dir / "model"
        model.mkdir(exist_ok=True)
        self.announced = publish(self.run_dir, number, {name: torch.tensor(value)}, model)
        return self.announced

    def refresh_after(self, seconds: float) -> None:
        self.now += seconds
        self.policies.refresh()

    def _newest(self) -> PolicyVersion | None:
        self.looks += 1
        return self.announced


class StandInReceiver:
    """Stands for a receiver, which got the version with the digest `received`, if any."""

    def __init__(self) -> None:
        self.received = ""
        self.looks = 0
        self.loaded: list[int] = []
        self.requested: list[int] = []

    def look(self) -> None:
        self.looks += 1

    def has(self, policy: PolicyVersion) -> bool:
        return policy.digest == self.received

    def load(self, policy: PolicyVersion) -> None:
        self.loaded.append(policy.number)

    def request_file(self, policy: PolicyVersion) -> None:
        self.requested.append(policy.number)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_before_the_first_version_it_waits_and_says_so(watched: Watched) -> None:
    watched.refresh_after(1)
    assert (watched.policies.version, watched.policies.problem) == (
        -1,
        "waits for the first policy version",
    )


def test_the_newest_version_is_loaded_once(watched: Watched) -> None:
    watched.publish(3, 0.5)
    watched.refresh_after(1)
    watched.refresh_after(1)
    assert watched.engine.loaded == [(3, 0.5)]
    assert (watched.policies.version, watched.policies.problem) == (3, None)


def test_it_looks_no_oftener_than_it_should(watched: Watched) -> None:
    for _ in range(10):
        watched.refresh_after(POLL_S * 0.3)
    assert watched.looks == 3


@pytest.mark.parametrize(
    ("number", "value"),
    [(3, 0.25), (2, 0.75)],
    ids=["the same number with other weights", "a lower number"],
)
def test_what_is_announced_anew_replaces_what_is_loaded(
    watched: Watched, number: int, value: float
) -> None:
    watched.publish(3, 0.5)
    watched.refresh_after(1)
    watched.publish(number, value)
    watched.refresh_after(1)
    assert watched.engine.loaded == [(3, 0.5), (number, value)]


def test_torn_weights_are_never_loaded_and_are_tried_again_until_they_are_whole(
    watched: Watched,
) -> None:
    watched.publish(3, 0.5)
    watched.refresh_after(1)
    policy = watched.publish(4, 0.6)
    path = watched.run_dir / policy.path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    watched.refresh_after(1)
    assert watched.policies.version == 3
    assert str(watched.policies.problem).startswith("cannot load policy version 4: ")
    path.write_bytes(whole)
    watched.refresh_after(RETRY_S / 2)
    assert watched.policies.version == 3
    watched.refresh_after(RETRY_S)
    assert (watched.policies.version, watched.policies.problem, watched.policies.failing_s) == (
        4,
        None,
        0.0,
    )


def test_how_long_loading_has_failed_counts_from_the_first_failure(watched: Watched) -> None:
    watched.publish(1, 0.5, name="other")
    for _ in range(4):
        watched.refresh_after(RETRY_S)
    assert watched.engine.loaded == []
    assert watched.policies.failing_s == pytest.approx(3 * RETRY_S)


def test_a_version_that_was_replaced_while_it_was_read_is_followed_by_the_newest_at_once(
    watched: Watched,
) -> None:
    watched.publish(3, 0.5)
    watched.refresh_after(1)
    old = watched.publish(4, 0.6)
    newest = watched.publish(4, 0.7)
    announcements = iter([old, newest])
    watched._newest = lambda: next(announcements, newest)  # type: ignore[method-assign]
    watched.policies._newest = watched._newest
    watched.refresh_after(1)
    assert watched.policies.version == 3
    watched.refresh_after(0)
    assert watched.engine.loaded[-1] == (4, pytest.approx(0.7))


def test_what_was_received_is_loaded_without_a_file_and_calls_are_looked_for_all_the_time(
    tmp_path: Path,
) -> None:
    receiver = StandInReceiver()
    watched = Watched(tmp_path, receiver)
    watched.announced = PolicyVersion(number=1, digest="ab", path="policies/000001", size_bytes=8)
    receiver.received = "ab"
    watched.refresh_after(POLL_S)
    watched.refresh_after(POLL_S)
    assert (receiver.loaded, receiver.looks, watched.engine.loaded) == ([1], 2, [])
    assert watched.policies.problem is None


def test_what_was_not_received_is_read_or_asked_for_as_a_file(tmp_path: Path) -> None:
    receiver = StandInReceiver()
    watched = Watched(tmp_path, receiver)
    watched.publish(1, 0.5)
    watched.refresh_after(POLL_S)
    assert (watched.engine.loaded, receiver.requested) == ([(1, 0.5)], [])
    watched.announced = PolicyVersion(number=2, digest="cd", path="policies/000002", size_bytes=8)
    watched.refresh_after(POLL_S)
    assert receiver.requested == [2]
    assert (
        watched.policies.problem is not None
        and "there are no weights of version 2" in watched.policies.problem
    )
