"""Which stage gets one more worker, from numbers worked by hand."""

from __future__ import annotations

import pytest

from onstream.settings.stages import StageName
from onstream.workers.launcher.scaling_decision import (
    Window,
    has_threads,
    one_more_worker,
    stage_to_grow,
    was_worth_it,
)

ONE_EACH: dict[StageName, int] = {"generate": 1, "verify": 1, "score": 1}
STAGES = tuple(ONE_EACH)


@pytest.mark.parametrize(
    ("cores_busy", "expected"),
    [
        (0.5, {"generate": 125.0, "score": 111.11, "verify": 100.0}),
        (0.875, {"generate": 114.29, "score": 111.11, "verify": 100.0}),
        (1.02, {"generate": 100.0, "score": 100.0, "verify": 100.0}),
    ],
)
def test_one_more_worker_takes_its_part_of_the_waiting_and_no_more_than_the_cores_have(
    cores_busy: float, expected: dict[str, float]
) -> None:
    window = Window(100.0, {"generate": 0.4, "score": 0.3}, cores_busy)
    # one of two generators' waiting is left, two of three teachers'
    assert one_more_worker(window, {"generate": 1, "verify": 1, "score": 2}) == expected


@pytest.mark.parametrize(
    ("waited_for", "cores_busy", "expected"),
    [
        ({"verify": 0.9, "score": 0.05}, 0.3, "verify"),
        ({"verify": 0.3, "score": 0.4}, 0.3, "score"),
        # half of 18 % is 9 %: not a tenth more rollouts
        ({"verify": 0.18}, 0.3, None),
        # the cores have no more than 5 % left, whoever is waited for
        ({"verify": 0.9}, 0.95, None),
        ({"train": 0.9}, 0.3, None),
        ({}, 0.3, None),
    ],
)
def test_the_stage_that_promises_most_grows_where_that_is_a_good_part(
    waited_for: dict[str, float], cores_busy: float, expected: str | None
) -> None:
    window = Window(100.0, waited_for, cores_busy)
    assert stage_to_grow(window, ONE_EACH, STAGES) == expected


def test_a_stage_that_is_no_candidate_does_not_grow_though_all_wait_for_it() -> None:
    window = Window(100.0, {"verify": 0.6, "score": 0.3}, 0.3)
    assert stage_to_grow(window, ONE_EACH, ["generate", "score"]) == "score"
    assert stage_to_grow(window, ONE_EACH, []) is None


def test_no_stage_grows_past_ten_workers_or_so_however_long_it_is_waited_for() -> None:
    def grows(workers: int) -> bool:
        window = Window(100.0, {"verify": 1.0}, cores_busy=0.1)
        return stage_to_grow(window, {"verify": workers}, ["verify"]) == "verify"

    assert [grows(workers) for workers in (1, 9, 11)] == [True, True, False]


@pytest.mark.parametrize(
    ("after", "expected"),
    [(121.0, True), (118.0, True), (87.0, True), (86.0, False), (60.0, False)],
)
def test_a_worker_is_worth_it_where_it_gives_about_half_of_what_was_predicted(
    after: float, expected: bool
) -> None:
    # 57 more are predicted; two fifths of that are 22.8
    assert was_worth_it(64.0, 121.0, after) is expected


@pytest.mark.parametrize(
    ("of_kind", "computing", "threads", "cores", "expected"),
    [
        (1, 3, 1, 2, True),
        (2, 4, 1, 2, False),
        (1, 3, 12, 64, True),
        (2, 4, 12, 64, True),
        (3, 5, 12, 64, False),
        (1, 3, 21, 64, False),
    ],
)
def test_workers_that_compute_keep_their_threads_within_the_cores(
    of_kind: int, computing: int, threads: int, cores: int, expected: bool
) -> None:
    assert has_threads(of_kind, computing, threads, cores) is expected
