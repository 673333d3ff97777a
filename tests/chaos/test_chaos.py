"""A short run under blows; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import ChaosRun
from tests.chaos.schedule import LONG, SHORT, schedule
from tests.chaos.verdict import problems, summary

SEED = 5
STEPS = 40
BEFORE = 0.57  # what the student of the example starts with


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_every_process_is_killed_loses_nothing_trains_nothing_twice_and_learns(
    tmp_path: Path,
) -> None:
    run = ChaosRun(tmp_path, steps=STEPS, eval_interval=20, say=print)
    with run.running():
        run.through(schedule(SEED, SHORT, redis_kills=1, empty=0, steps=STEPS))
        assert problems(run) == []
        found = summary(run)
    assert found["audit"]["trained"] >= STEPS * 120
    assert found["exact"] > BEFORE + 0.1
    assert {"kill redis", "fill redis", "stop trainer", *SHORT} <= set(run.dealt)


def test_a_seed_draws_the_same_blows_again_and_the_long_schedule_has_what_is_promised() -> None:
    blows = schedule(7, LONG, redis_kills=3, empty=1, steps=80)
    assert (
        blows
        == schedule(7, LONG, redis_kills=3, empty=1, steps=80)
        != schedule(8, LONG, redis_kills=3, empty=1, steps=80)
    )
    assert [blow.step for blow in blows] == sorted(blow.step for blow in blows) and blows[
        -1
    ].step < 80
    deeds = [blow.deed for blow in blows]
    assert deeds.count("kill") >= 30 and deeds.count("kill redis") == 3
    assert (
        deeds.count("fill redis") == deeds.count("stop trainer") == deeds.count("empty redis") == 1
    )
    assert {blow.kind for blow in blows if blow.deed == "kill"} == set(LONG)
