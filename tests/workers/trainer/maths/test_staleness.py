"""How old the policy was that wrote."""

from __future__ import annotations

from onstream.pipeline.records import VersionSpan
from onstream.workers.trainer.batches.batch_builder import oldest_version
from onstream.workers.trainer.maths.scalars import UNWRITTEN, staleness, token_staleness
from tests.workers.trainer.records import rollout


def test_the_oldest_version_of_any_span_counts() -> None:
    assert oldest_version(rollout(1, versions=(4, 3, 5))) == 3


def test_what_no_policy_wrote_has_no_version_and_no_staleness() -> None:
    assert oldest_version(rollout(1, versions=())) is None
    assert staleness(None, 9) == 0


def test_trained_at_its_own_version_staleness_is_zero() -> None:
    assert [staleness(7, version) for version in (7, 8, 10)] == [0, 1, 3]


def test_what_a_version_wrote_that_a_resumed_run_has_not_reached_again_is_not_stale() -> None:
    assert staleness(9, 7) == 0


def test_each_token_is_as_old_as_the_version_of_its_own_span() -> None:
    spans = [
        VersionSpan(4, 0, 2),
        VersionSpan(6, 3, 4),
        VersionSpan(7, 4, 5),
    ]  # token 2 is a tool's
    assert token_staleness(spans, 6, version=6) == [2, 2, UNWRITTEN, 0, 0, UNWRITTEN]


def test_a_span_past_the_end_of_the_completion_ages_no_more_tokens_than_there_are() -> None:
    assert token_staleness([VersionSpan(1, 1, 9)], 3, version=2) == [UNWRITTEN, 1, 1]
