"""The report of a run, from rows worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.run_files.json_lines import read_rows
from onstream.workers.launcher.report import build, summary


def row(step: int, **metrics: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1000.0 + step,
        "rollouts": 64,
        "wait_s": 0.25,
        "elapsed_s": 1.0,
        **metrics,
    }


def test_seconds_are_the_elapsed_time_of_every_step() -> None:
    rows = [row(step) for step in range(1, 21)]
    report = summary(rows, [])
    assert (report["steps"], report["seconds"], report["rollouts"], report["rollouts_per_s"]) == (
        20,
        20.0,
        1280,
        64.0,
    )
    assert report["wait_share"] == 0.25


def test_teacher_kl_is_taken_at_step_one_and_over_the_last_ten_steps() -> None:
    rows = [row(step, teacher_kl=1.0 / step) for step in range(1, 13)]
    expected = sum(1.0 / step for step in range(3, 13)) / 10
    assert summary(rows, [])["teacher_kl"] == {"first": 1.0, "last": pytest.approx(expected)}


def test_steps_without_a_metric_are_left_out_of_its_mean() -> None:
    rows = [row(1, reward=None), row(2, reward=0.5), row(3, reward=1.0), row(4)]
    assert summary(rows, [])["reward"] == {"first": None, "last": 0.75}


def test_staleness_is_the_mean_of_means_and_the_greatest() -> None:
    rows = [
        row(1, staleness_mean=0.0, staleness_max=0),
        row(2, staleness_mean=1.5, staleness_max=2),
    ]
    assert summary(rows, [])["staleness"] == {"mean": 0.75, "max": 2.0}


def test_the_mismatch_by_staleness_weighs_every_token_the_same() -> None:
    rows = [
        row(1, mismatch_by_staleness={"0": {"mean": 1.0, "max": 2.0, "tokens": 3}}),
        row(2, mismatch_by_staleness=None),
        row(
            3,
            mismatch_by_staleness={
                "0": {"mean": 5.0, "max": 9.0, "tokens": 1},
                "1": {"mean": 4.0, "max": 4.0, "tokens": 2},
            },
        ),
    ]
    assert summary(rows, [])["mismatch_by_staleness"] == {
        "0": {"mean": 2.0, "max": 9.0, "tokens": 4},
        "1": {"mean": 4.0, "max": 4.0, "tokens": 2},
    }


def test_eval_before_is_version_zero_and_after_the_newest_one() -> None:
    evals = [
        {"version": version, "exact": exact, "samples": 256}
        for version, exact in ((0, 0.6), (20, 0.8), (60, 0.97), (60, 0.98))
    ]
    assert summary([row(1)], evals)["eval"] == {
        "before": 0.6,
        "after": 0.98,
        "version": 60,
        "samples": 256,
    }


def test_a_run_that_was_not_evaluated_says_so() -> None:
    assert summary([row(1)], [])["eval"] == {
        "before": None,
        "after": None,
        "version": None,
        "samples": None,
    }
    only_before = [{"version": 0, "exact": 0.6, "samples": 256}]
    assert summary([], only_before)["eval"] == {
        "before": 0.6,
        "after": None,
        "version": None,
        "samples": 256,
    }


def test_the_shares_with_images_swapped_stand_beside_the_others_where_they_were_taken() -> None:
    evals = [
        {"version": version, "exact": 0.1 + version, "exact_swapped": 0.1, "samples": 8}
        for version in (0, 3)
    ]
    assert summary([], evals)["eval"]["swapped"] == {"before": 0.1, "after": 0.1}
    assert summary([], evals)["evals"][1] == {"version": 3, "exact": 3.1, "exact_swapped": 0.1}
    del evals[0]["exact_swapped"]
    assert summary([], evals)["eval"]["swapped"] == {"before": None, "after": 0.1}
    assert summary([], evals)["evals"][0] == {"version": 0, "exact": 0.1}


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    assert read_rows(tmp_path / "none") == []


def test_a_broken_line_in_the_middle_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_rows(path)


def test_build_leaves_a_report_and_a_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(row(step, teacher_kl=1 / step, reward=0.5)) + "\n" for step in range(1, 13)
        )
    )
    (tmp_path / "evals.jsonl").write_text('{"version": 0, "exact": 0.5, "samples": 8}\n')
    report = build(tmp_path, {"cpu_seconds": {"train": 1.5}})
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["cpu_seconds"] == {"train": 1.5}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "report.json.tmp").exists()
    assert build(tmp_path) == report


def test_a_run_without_a_step_has_a_report_and_no_picture(tmp_path: Path) -> None:
    report = build(tmp_path)
    assert (report["steps"], report["seconds"], report["rollouts_per_s"]) == (0, 0, None)
    assert not (tmp_path / "curves.png").exists()


def test_what_was_unscored_cut_off_dropped_and_dead_is_counted_over_all_steps() -> None:
    rows = [
        row(1, unscored=64, unscored_reason="KeyError: 'a' (s.py:2)", truncated_share=1.0, dead=3),
        row(2, unscored=0, truncated_share=0.8, dropped_stale=4, dropped_other=8, grad_norm=0.0),
    ]
    report = summary(rows, [])
    assert report["unscored"] == {"rollouts": 64, "reason": "KeyError: 'a' (s.py:2)"}
    assert report["truncated_share"] == pytest.approx(0.9)
    assert report["dropped"] == {"stale": 4, "other": 8}
    assert (report["dead"], report["steps_without_gradient"]) == (3, 1)


def test_the_held_out_reward_stands_beside_the_exact_answers() -> None:
    evals = [
        {"version": version, "exact": 0.0, "reward": reward, "samples": 8}
        for version, reward in ((0, 0.25), (5, 0.75))
    ]
    found = summary([row(5)], evals)["eval"]
    assert found["reward"] == {"before": 0.25, "after": 0.75}


def test_dead_letters_stay_in_a_report_that_is_written_again(tmp_path: Path) -> None:
    dead = [{"stage": "generate", "reason": "the prompt is too long", "count": 12}]
    assert build(tmp_path, {}, dead)["dead_letters"] == dead
    assert build(tmp_path)["dead_letters"] == dead


def test_the_waiting_is_shared_out_among_the_stages_the_largest_first() -> None:
    rows = [
        row(1, waited_for={"generate": 0.125, "score": 0.125}),
        row(2, waited_for={"score": 0.25}),
        row(3),
    ]
    shares = summary(rows, [])["waited_for"]
    assert list(shares.items()) == [("score", 0.125), ("generate", pytest.approx(0.125 / 3))]


def test_a_report_without_a_launcher_keeps_what_the_one_before_said(tmp_path: Path) -> None:
    line = json.dumps(row(1, waited_for={"generate": 0.25})) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line)
    added = [{"stage": "generate", "workers": 2}]
    first = build(tmp_path, {"cores_busy": 0.5, "balance": added}, [], {"generate": 1})
    assert first["balance"] == added
    assert first["one_more_worker"] == {"generate": pytest.approx(64 / 0.875, abs=0.01)}
    assert build(tmp_path) == first
