"""What is shown of a run, on a terminal and elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from onstream.workers.launcher.progress import (
    Display,
    RunView,
    StageView,
    clock,
    panel,
    result_table,
    status_lines,
)
from onstream.workers.launcher.report import summary

VIEW = RunView(
    step=12,
    max_steps=60,
    metrics={
        "reward": 0.75,
        "teacher_kl": 0.03125,
        "loss": None,
        "staleness_mean": 1.25,
        "staleness_max": 2.0,
    },
    rollouts_per_s=431.6,
    eta_s=14.2,
    stages=(StageView("generate", 1, 1, True, 256), StageView("score", 0, 0, False, 31)),
    waits=("score: 31 records wait and no worker takes them",),
)


def test_the_status_line_holds_figures_backlogs_and_what_is_waited_for() -> None:
    assert status_lines(VIEW) == [
        "step 12/60  reward 0.75  teacher_kl 0.03125  432 rollouts/s  staleness 1.2 (max 2)  "
        "ETA 0:14  backlog generate 256 score 31",
        "  waiting: score: 31 records wait and no worker takes them",
    ]


def test_the_status_line_of_episodes_has_their_turns() -> None:
    episodes = replace(VIEW, metrics={**VIEW.metrics, "turns_mean": 2.94})
    assert "teacher_kl 0.03125  2.9 turns  432 rollouts/s" in status_lines(episodes)[0]
    single = replace(VIEW, metrics={**VIEW.metrics, "turns_mean": 1.0})
    assert status_lines(single) == status_lines(VIEW)


def test_no_line_of_the_status_is_longer_than_159_characters() -> None:
    path = "/home/me/" + "long/" * 40
    view = replace(
        VIEW,
        metrics={**VIEW.metrics, "loss": 123456.789},
        stages=[StageView(name, 1, 1, True, 123456) for name in ("generate", "verify", "score")],
        waits=(f"generate, score: not ready: {'loads a model; ' * 20}", path),
    )
    lines = status_lines(view)
    assert max(map(len, lines)) < 160
    assert "".join(lines).replace(" ", "").endswith(path)


def test_before_anything_flows_the_status_line_says_only_what_is_waited_for() -> None:
    stages = (StageView("generate", 1, 0, False, 0),)
    assert (
        "".join(
            status_lines(RunView(0, 60, stages=stages, waits=["generate is not ready: starting"]))
        )
        == "step 0/60  waiting: generate is not ready: starting"
    )


def test_without_a_terminal_the_same_line_is_not_printed_twice() -> None:
    text = io.StringIO()
    with Display("demo", Console(file=text, width=80), interval_s=0) as display:
        display.show(VIEW)
        display.show(VIEW)
        display.show(RunView(13, 60))
    assert text.getvalue().splitlines() == [*status_lines(VIEW), "step 13/60"]


def test_without_a_terminal_lines_keep_their_interval() -> None:
    text = io.StringIO()
    with Display("demo", Console(file=text, width=80), interval_s=3600) as display:
        display.show(RunView(1, 60))
        display.show(RunView(2, 60))
    assert text.getvalue() == "step 1/60\n"


def test_on_a_terminal_the_panel_shows_the_stages_and_what_is_waited_for() -> None:
    text = io.StringIO()
    Console(file=text, width=120, force_terminal=True, color_system=None).print(panel("demo", VIEW))
    shown = [line.split() for line in text.getvalue().splitlines()]
    assert shown[0][0] == "demo"
    assert shown[0][-2:] == ["step", "12/60"]
    assert ["generate", "1", "ready", "256"] in shown
    assert ["score", "0", "absent", "31"] in shown
    assert shown[-1][:2] == ["waiting:", "score:"]


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_cuts_no_heading_and_no_number(width: int) -> None:
    text = io.StringIO()
    details = ("loads the teacher from " + "/long" * 30, "waits for policy version 13, " * 5)
    stages = [StageView("generate", 12, 1, True, 16384, detail) for detail in details]
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    console.print(panel("a-run-with-quite-a-long-name", replace(VIEW, stages=stages)))
    shown = [line.split() for line in text.getvalue().splitlines()]
    assert ["stage", "workers", "state", "backlog"] in shown
    assert [row[:4] for row in shown].count(["generate", "12", "ready", "16384"]) == 2
    assert max(len(line.rstrip()) for line in text.getvalue().splitlines()) <= width
    assert "staleness 1.2 (max 2)" in text.getvalue()


def test_the_result_breaks_no_figure_of_many() -> None:
    text = io.StringIO()
    report = summary([], []) | {
        "cpu_seconds": dict.fromkeys(("trainer", "teacher", "generator", "verifier", "eval"), 12.5)
    }
    Console(file=text, width=80).print(result_table(report))
    shown = [line.split() for line in text.getvalue().splitlines()]
    assert ["CPU", "seconds", "trainer", "12.5", "teacher", "12.5", "generator", "12.5"] in shown
    assert ["verifier", "12.5", "eval", "12.5"] in shown


def test_a_sentence_with_brackets_is_not_taken_for_markup() -> None:
    text = io.StringIO()
    Display("demo", Console(file=text, width=80), interval_s=1).say("stages = [red]")
    assert text.getvalue() == "stages = [red]\n"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(7.4, "0:07"), (750, "12:30"), (11045, "3:04:05")]
)
def test_durations_read_like_a_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


def test_the_result_says_a_dash_for_what_was_not_measured() -> None:
    text = io.StringIO()
    nothing = {"first": None, "last": None}
    report = {
        "steps": 3,
        "seconds": 1.5,
        "rollouts": 24,
        "rollouts_per_s": 16.0,
        "eval": {"before": 0.5, "after": None},
        "teacher_kl": nothing,
        "reward": nothing,
        "cpu_seconds": {"trainer": 1.25, "redis": 0.5},
    }
    Console(file=text, width=80).print(result_table(report))
    Console(file=text, width=80).print(
        result_table(
            report
            | {"eval": {"before": 0.03, "after": 0.9, "swapped": {"before": 0.04, "after": 0}}}
        )
    )
    rows = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "eval (exact, held out) 0.5 → –" in rows
    assert rows.count("eval (images swapped) 0.04 → 0") == 1
    assert "CPU seconds trainer 1.2 redis 0.5" in rows
