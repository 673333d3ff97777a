"""Groups become complete, batches take them in that order, and every number has one fate."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest

from onstream.pipeline.records import Rollout, Tombstone
from onstream.workers.trainer.batches.batch_builder import (
    BatchBuilder,
    DroppedUnit,
    DuplicateNumber,
    TrainableUnit,
    TrainingRules,
)
from tests.workers.trainer.records import rollout, tombstone


def builder(
    *,
    group_size: int = 4,
    batch_size: int = 8,
    unit: Literal["group", "rollout"] = "group",
    max_staleness: int = 2,
    **rules: Any,
) -> BatchBuilder:
    return BatchBuilder(
        TrainingRules(max_staleness, **rules),
        group_size=group_size,
        batch_size=batch_size,
        unit=unit,
    )


def filled(records: list[Rollout | Tombstone], **arguments: Any) -> BatchBuilder:
    found = builder(**arguments)
    for record in records:
        found.add(record)
    return found


def numbers(batch: list[TrainableUnit] | None) -> list[list[int]] | None:
    if batch is None:
        return None
    return [[rollout.number for rollout in unit.rollouts] for unit in batch]


def group(first: int, **arguments: Any) -> list[Rollout | Tombstone]:
    return [rollout(number, **arguments) for number in range(first, first + 4)]


def test_a_group_is_complete_at_the_record_of_its_last_member() -> None:
    found = builder()
    for record in (rollout(2), rollout(1), tombstone(4)):
        found.add(record)
        assert found.complete_units == 0
    found.add(rollout(3))
    assert (found.complete_units, found.missing(), found.numbers) == (1, {}, {1, 2, 3, 4})


def test_an_open_group_says_how_many_are_missing() -> None:
    assert filled([rollout(1), rollout(6), rollout(7)]).missing() == {0: 3, 1: 2}


def test_a_batch_is_the_next_groups_in_the_order_in_which_they_became_complete() -> None:
    found = filled([*group(9), *group(1), rollout(5)])
    assert numbers(found.batch(0)) == [[9, 10, 11, 12], [1, 2, 3, 4]]
    assert found.batch(0) is None
    assert found.numbers == {5}


def test_too_few_complete_groups_make_no_batch_and_lose_nothing() -> None:
    found = filled(group(1))
    assert (found.batch(0), found.complete_units) == (None, 1)


def test_members_are_trained_in_the_order_of_their_numbers_whatever_the_order_they_came_in() -> (
    None
):
    found = filled([rollout(number) for number in (4, 2, 8, 3, 7, 6, 1, 5)])
    assert numbers(found.batch(0)) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_the_same_stream_gives_the_same_batches_however_often_it_is_asked() -> None:
    records = [rollout(number) for number in range(1, 41)]
    random.Random(0).shuffle(records)
    eager = builder()
    late = filled(list(records))
    batches = []
    for record in records:
        eager.add(record)
        batches.append(numbers(eager.batch(0)))
    assert [batch for batch in batches if batch] == [numbers(late.batch(0)) for _ in range(5)]


def test_a_group_as_stale_as_its_oldest_member_is_dropped_whole_and_once() -> None:
    found = filled(
        [rollout(1, versions=(5,)), rollout(2, versions=(5, 2)), rollout(3), tombstone(4)],
        max_staleness=4,
    )
    assert found.drop(4) == []
    assert found.drop(5) == [DroppedUnit(0, {1: "stale", 2: "stale", 3: "stale"}, (4,))]
    assert (found.drop(5), found.numbers) == ([], set())


def test_staleness_counts_at_the_step_that_would_train_it() -> None:
    found = filled(
        [*group(1, versions=(3,)), *group(5, versions=(4,)), *group(9, versions=(5,))],
        max_staleness=1,
    )
    batch = found.batch(5)
    assert numbers(batch) == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch is not None and [chosen.staleness for chosen in batch] == [1, 0]
    assert [dropped.group for dropped in found.drop(5)] == [0]


def test_with_no_staleness_allowed_only_the_steps_own_version_trains() -> None:
    found = filled(
        [*group(1, versions=(6,)), *group(5, versions=(7,))], max_staleness=0, batch_size=4
    )
    assert numbers(found.batch(7)) == [[5, 6, 7, 8]]


def test_a_dead_member_leaves_its_group_and_is_not_replaced() -> None:
    found = filled([rollout(1), tombstone(2), rollout(3), rollout(4)], batch_size=4)
    assert found.drop(0) == []
    (chosen,) = found.batch(0) or []
    assert ([one.number for one in chosen.rollouts], chosen.dead, chosen.dropped) == (
        [1, 3, 4],
        (2,),
        {},
    )


def test_a_group_without_a_live_member_is_dropped_to_be_replaced() -> None:
    found = filled([tombstone(number) for number in range(1, 5)])
    assert found.drop(0) == [DroppedUnit(0, dict.fromkeys(range(1, 5), "group_dead"), ())]


def test_a_rollout_without_a_reward_trains_where_the_teacher_can_train_it() -> None:
    found = filled(
        [rollout(1, reward=None), *(rollout(number) for number in (2, 3, 4))], batch_size=4
    )
    assert numbers(found.batch(0)) == [[1, 2, 3, 4]]


def test_where_nothing_else_trains_it_a_rollout_without_a_reward_is_dropped() -> None:
    found = filled(
        [rollout(1, reward=None), tombstone(2), rollout(3), rollout(4)],
        batch_size=4,
        train_unscored=False,
    )
    assert found.batch(0) == [
        TrainableUnit(0, (rollout(3), rollout(4)), 0, {1: "not_verified"}, (2,))
    ]


def test_a_group_without_any_reward_is_replaced_where_nothing_else_trains_it() -> None:
    found = filled([*group(1, reward=None)[:3], tombstone(4)], train_unscored=False)
    assert found.drop(0) == [
        DroppedUnit(0, {1: "not_verified", 2: "not_verified", 3: "not_verified"}, (4,))
    ]


def test_equal_rewards_fill_their_place() -> None:
    assert numbers(filled(group(1, reward=0.0), batch_size=4).batch(0)) == [[1, 2, 3, 4]]


def test_where_the_unit_is_the_rollout_each_one_is_complete_and_dropped_alone() -> None:
    records = [
        rollout(3, versions=(1,)),
        rollout(1, versions=(9,)),
        tombstone(7),
        rollout(5, versions=(9,)),
        rollout(6, versions=(9,)),
    ]
    found = filled(records, unit="rollout", batch_size=4, group_size=2)
    assert [dropped.dropped for dropped in found.drop(9)] == [{3: "stale"}, {7: "group_dead"}]
    assert found.batch(9) is None
    found.add(rollout(2, versions=(9,)))
    assert numbers(found.batch(9)) == [[1], [5], [6], [2]]


def test_only_rollouts_that_reach_the_least_reward_are_kept() -> None:
    records = [rollout(1), rollout(2, reward=0.9), rollout(3, reward=None), rollout(4)]
    found = filled(records, unit="rollout", batch_size=4, least_reward=1.0)
    assert [dropped.dropped for dropped in found.drop(0)] == [
        {2: "not_verified"},
        {3: "not_verified"},
    ]
    for number in (5, 6):
        found.add(rollout(number))
    assert numbers(found.batch(0)) == [[1], [4], [5], [6]]


def test_a_number_that_comes_twice_is_refused() -> None:
    found = filled(group(1))
    with pytest.raises(DuplicateNumber, match="number 3 came twice"):
        found.add(tombstone(3))


def test_a_batch_that_is_not_whole_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 6 rollouts is not whole groups of 4"):
        builder(batch_size=6)


def test_every_number_has_exactly_one_fate() -> None:
    source = random.Random(1)
    records: list[Rollout | Tombstone] = [
        tombstone(number)
        if source.random() < 0.3
        else rollout(number, versions=(source.randrange(9),), reward=source.choice([None, 1.0]))
        for number in range(1, 401)
    ]
    source.shuffle(records)
    found = filled(records, max_staleness=6, train_unscored=False)
    fates = [number for dropped in found.drop(9) for number in (*dropped.dropped, *dropped.dead)]
    while batch := found.batch(9):
        fates += [
            number
            for one in batch
            for number in (*(live.number for live in one.rollouts), *one.dropped, *one.dead)
        ]
    assert sorted([*fates, *found.numbers]) == list(range(1, 401))
