"""How old the policy was that wrote."""

from __future__ import annotations

from tests.workers.trainer.records import rollout
from workers.trainer.staleness import oldest_version, staleness


def test_the_oldest_version_of_any_span_counts() -> None:
    assert oldest_version(rollout(1, versions=(4, 3, 5))) == 3


def test_what_no_policy_wrote_has_no_version_and_no_staleness() -> None:
    assert oldest_version(rollout(1, versions=())) is None
    assert staleness(None, 9) == 0


def test_trained_at_its_own_version_staleness_is_zero() -> None:
    assert [staleness(7, version) for version in (7, 8, 10)] == [0, 1, 3]


def test_what_a_version_wrote_that_a_resumed_run_has_not_reached_again_is_not_stale() -> None:
    assert staleness(9, 7) == 0
