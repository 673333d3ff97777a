"""The comparison with TRL: its arithmetic, what it keeps, and how it chooses. TRL itself is run by
`make bench-peers` alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kept_results import KeptResults
from benchmarks.peers.measured import rates, way_to_goal
from benchmarks.peers.sizes import EXAMPLE, SHORT, SIZES, TrlForm
from benchmarks.peers.sweep import best_form
from benchmarks.peers.table import Rounds, Spread, as_json, table_of, three_digits
from benchmarks.peers.usage import Usage, UsageWatch

BURN_S = 0.2
PARENT = f"""
import subprocess, sys
burn = "import time\\nwhile time.process_time() < {BURN_S}: pass"
subprocess.run([sys.executable, "-S", "-c", burn], check=True)
print("burnt", flush=True)
sys.stdin.read()
"""
RUN = {"size": "a", "side": "trl", "seed": 0, "versions": {"trl": "1.16.0"}}


def steps(count: int) -> list[dict[str, Any]]:
    """Steps of 2 s and 8 rollouts, of 10 tokens each; the first takes 12 s. They begin at 100."""
    return [
        {
            "time": 112.0 + 2 * place,
            "elapsed_s": 2.0 if place else 12.0,
            "rollouts": 8,
            "tokens": 80,
        }
        for place in range(count)
    ]


def test_first_and_last_steps_are_left_out_of_the_rates() -> None:
    usage = Usage(times=[100.0, 112.0, 122.0], cpu_s=[0.0, 30.0, 40.0], rss_bytes=[1, 7, 5])
    found = rates(steps(6), usage, first=1, last=2)
    assert found == {
        "timed_steps": 3,
        "rollouts_per_s": 4.0,
        "tokens_per_s": 40.0,
        "cpu_s_per_rollout": pytest.approx(6 / 24),  # of 112 to 118, at one core
        "peak_bytes": 7,
    }


def test_a_child_that_has_ended_counts_in_the_cpu_seconds_of_a_run() -> None:
    command = [sys.executable, "-S", "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        watch = UsageWatch(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline() == b"burnt\n"
        ended = len(watch.usage.times)
        while len(watch.usage.times) < ended + 2:  # a look that began after the child's end
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        usage = watch.stop()
    assert usage.cpu_s[-1] >= BURN_S
    assert usage.cpu_s == sorted(usage.cpu_s)
    assert usage.peak_bytes > 0


def test_rates_need_a_step_that_is_timed() -> None:
    with pytest.raises(ValueError, match="3 steps, of which 1 at the start and 2 at the end"):
        rates(steps(3), Usage([0.0], [0.0], [1]), first=1, last=2)


def test_the_way_to_the_goal_ends_at_the_first_evaluation_that_reaches_it() -> None:
    exact = {5: 0.7, 10: 0.95, 15: 0.9}
    found = way_to_goal(steps(20), exact.__getitem__)
    assert found == {
        "steps_to_goal": 10,
        "seconds_to_goal": 12.0 + 9 * 2.0,
        "exact": [(5, 0.7), (10, 0.95)],
    }


def test_a_run_that_never_reaches_the_goal_has_no_seconds_to_it() -> None:
    found = way_to_goal(steps(5), lambda step: 0.9)
    assert found["steps_to_goal"] is None
    assert found["seconds_to_goal"] is None


def test_a_ratio_is_taken_round_by_round() -> None:
    theirs = [{"tokens_per_s": 10.0}, {"tokens_per_s": 20.0}, {"tokens_per_s": 10.0}]
    ours = [{"tokens_per_s": 20.0}, {"tokens_per_s": 80.0}, {"tokens_per_s": 30.0}]
    rounds = Rounds(EXAMPLE, {"TRL": theirs, "Onstream": ours})
    assert rounds.ratios("Onstream", "TRL")["tokens_per_s"] == Spread(median=3.0, low=2.0, high=4.0)
    assert rounds.spreads("TRL")["tokens_per_s"] == Spread(median=10.0, low=10.0, high=20.0)
    assert rounds.ratios("Onstream", "TRL")["steps_to_goal"] is None


def test_rounds_that_miss_the_goal_are_counted_and_not_averaged() -> None:
    reached = {"steps_to_goal": 30, "seconds_to_goal": 6.0}
    missed = {"steps_to_goal": None, "seconds_to_goal": None}
    rounds = Rounds(EXAMPLE, {"TRL": [reached, missed], "Onstream": [reached, reached]})
    assert rounds.missed("TRL") == 1
    assert rounds.spreads("TRL")["steps_to_goal"] == Spread(30, 30, 30)
    assert rounds.ratios("Onstream", "TRL")["steps_to_goal"] == Spread(1.0, 1.0, 1.0)


def test_the_table_has_each_contender_and_each_ratio() -> None:
    result = {
        "timed_steps": 3,
        "rollouts_per_s": 4.0,
        "tokens_per_s": 40.0,
        "cpu_s_per_rollout": 0.002,
        "peak_bytes": 2**30,
    }
    rounds = Rounds(SHORT, {"TRL": [result], "Onstream": [result | {"tokens_per_s": 200.0}]})
    table = table_of([rounds])
    assert list(table.columns[1].cells) == ["TRL", "Onstream", "Onstream / TRL"]
    assert list(table.columns[3].cells) == ["40 (40–40)", "200 (200–200)", "5.00 (5.00–5.00)"]
    assert list(table.columns[5].cells) == ["–", "–", "–"]
    [data] = json.loads(json.dumps(as_json([rounds])))
    assert data["ratios"]["Onstream / TRL"]["tokens_per_s"]["median"] == 5.0


def test_rates_are_shown_without_an_exponent() -> None:
    assert [three_digits(value) for value in (0.0753, 5.467, 1729.45)] == [
        "0.0753",
        "5.47",
        "1,729",
    ]


def test_a_stopped_benchmark_goes_on_with_the_results_that_it_kept(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "results.jsonl"
    KeptResults(file).get(RUN, lambda: {"tokens_per_s": 1.0})
    with file.open("a") as cut_off:
        cut_off.write('{"run": {"size"')

    def unexpected() -> dict[str, Any]:
        raise AssertionError("a kept run was done again")

    again = KeptResults(file)
    assert again.get(dict(reversed(RUN.items())), unexpected) == {"tokens_per_s": 1.0}


def test_a_run_with_another_version_is_another_run(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path / "results.jsonl")
    kept.get(RUN, lambda: {"tokens_per_s": 1.0})
    newer = RUN | {"versions": {"trl": "1.17.0"}}
    assert kept.get(newer, lambda: {"tokens_per_s": 2.0}) == {"tokens_per_s": 2.0}


def test_a_run_is_kept_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"run": {"size"')
    KeptResults(file).get(RUN, lambda: {"tokens_per_s": 1.0})
    assert KeptResults(file).has(RUN)


def test_the_best_form_is_the_one_with_the_fewest_seconds_to_the_goal() -> None:
    def fast(form: TrlForm) -> dict[str, Any]:
        return {"tokens_per_s": 100.0 * form.threads}

    def whole(form: TrlForm) -> dict[str, Any]:
        reached = form.lr == 1e-3 and form.schedule == "cosine" and form.objective == "top-k"
        return {"tokens_per_s": 1.0, "seconds_to_goal": 5.0 if reached else None}

    best, tried = best_form(EXAMPLE, fast, whole)
    assert best == TrlForm("top-k", threads=2, lr=1e-3, schedule="cosine")
    assert len(tried) == len(EXAMPLE.forms) + 2 * 3 * 2


def test_where_the_goal_does_not_count_the_fastest_form_is_the_best() -> None:
    speeds = {form: float(place) for place, form in enumerate(SHORT.forms)}

    def unexpected(form: TrlForm) -> dict[str, Any]:
        raise AssertionError(f"{form} was run whole")

    best, _ = best_form(SHORT, lambda form: {"tokens_per_s": speeds[form]}, unexpected)
    assert best == SHORT.forms[-1]


def test_micro_batches_divide_the_batch_of_every_form() -> None:
    for size in SIZES.values():
        assert all(size.batch % form.rows == 0 for form in size.forms)
