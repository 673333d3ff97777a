"""The `jsonl` task: its format, its held-out part, and what it says of bad lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Task, load_scorer, load_task
from onstream.settings.load import load_settings
from onstream.settings.root import Settings

ROOT = Path(__file__).parents[3]
MINE = "tests.workers.verifier.misbehaving:score"


def settings_of(
    path: Path, *, samples: int = 0, seed: int = 0, enabled: bool | None = None, **task: Any
) -> Settings:
    return Settings.model_validate(
        {
            "task": {"name": "jsonl", "path": path, **task},
            "eval": {"samples": samples},
            "run": {"seed": seed},
            "orchestrator": {"verification": {"enabled": enabled}},
        }
    )


def written(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return path


def prompts(*names: object) -> list[dict[str, str]]:
    return [{"prompt": str(name), "answer": str(name)} for name in names]


def asked(task: Task, count: int) -> list[str]:
    return [str(task.train(index).messages[-1]["content"]) for index in range(count)]


def held_out(task: Task) -> list[str]:
    return [
        str(task.held_out(index).messages[-1]["content"]) for index in range(task.held_out_size)
    ]


def test_a_line_holds_messages_or_a_prompt_and_an_answer(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    path = written(
        tmp_path / "t.jsonl", {"messages": chat, "answer": 4}, "", {"prompt": "3+3?", "answer": "6"}
    )
    settings = settings_of(path)
    task = load_task(settings)
    problems = sorted(
        (task.train(index) for index in range(2)), key=lambda problem: str(problem.info["answer"])
    )
    assert [problem.messages for problem in problems] == [
        chat,
        [{"role": "user", "content": "3+3?"}],
    ]
    assert [problem.info for problem in problems] == [{"answer": "4"}, {"answer": "6"}]
    assert load_scorer(settings)(" 6\n", {"answer": "6"}) == {"reward": 1.0, "similarity": 1.0}


def test_fields_can_have_other_names_and_a_system_prompt_joins_those_without(
    tmp_path: Path,
) -> None:
    chat = [{"role": "system", "content": "Own."}, {"role": "user", "content": "b"}]
    path = written(tmp_path / "t.jsonl", {"q": "a", "a": "1"}, {"q": chat, "a": "2"})
    task = load_task(settings_of(path, prompt_field="q", answer_field="a", system_prompt="Common."))
    by_answer = {
        problem.info["answer"]: problem.messages for problem in (task.train(0), task.train(1))
    }
    assert by_answer == {
        "1": [{"role": "system", "content": "Common."}, {"role": "user", "content": "a"}],
        "2": chat,
    }


def test_each_epoch_has_every_problem_once_in_an_order_of_its_own_that_the_seed_decides(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "t.jsonl", *prompts(*range(20)))
    order = asked(load_task(settings_of(path)), 40)
    assert sorted(order[:20]) == sorted(order[20:]) == sorted(map(str, range(20)))
    assert order[:20] != order[20:]
    assert (
        order
        == asked(load_task(settings_of(path)), 40)
        != asked(load_task(settings_of(path, seed=1)), 40)
    )


def test_the_last_lines_are_held_out_and_not_trained_on(tmp_path: Path) -> None:
    task = load_task(settings_of(written(tmp_path / "t.jsonl", *prompts(*"abcdef")), samples=2))
    assert held_out(task) == ["e", "f"]
    assert set(asked(task, 12)) == set("abcd")


def test_lines_that_ask_the_same_as_a_held_out_one_are_not_trained_on(tmp_path: Path) -> None:
    as_messages = {"messages": [{"role": "user", "content": "f"}], "answer": "another answer"}
    with_system = {
        "messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "e"}],
        "answer": "e",
    }
    path = written(
        tmp_path / "t.jsonl", *prompts(*"abefea"), as_messages, with_system, *prompts(*"bef")
    )
    for seed in range(5):
        task = load_task(settings_of(path, samples=2, seed=seed))
        assert held_out(task) == ["e", "f"]
        assert set(asked(task, 40)) == {"a", "b"}


def test_a_file_of_its_own_can_be_held_out(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", *prompts(*"abcd"))
    task = load_task(
        settings_of(path, eval_path=written(tmp_path / "e.jsonl", *prompts(*"dxyz")), samples=3)
    )
    assert held_out(task) == ["d", "x", "y"]
    assert set(asked(task, 20)) == set("abc")


@pytest.mark.parametrize("rows", [prompts(*"abc"), [*prompts(*"bbabc")]])
def test_holding_out_everything_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    path = written(tmp_path / "t.jsonl", *rows)
    with pytest.raises(UserError, match=r"none to train on; expected .* or lower `eval.samples`"):
        load_task(settings_of(path, samples=3))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "{'prompt': 'x'}",
            r"line 3: \"\{'prompt': 'x'\}\" is not JSON \(.*\); expected one JSON object a line",
        ),
        ('"words"', "line 3: it holds 'words'; expected an object with `messages` or `prompt`"),
        (
            {"answer": "4"},
            r"line 3: `prompt` is None; "
            r"expected `messages` or a text in `prompt` \(keys here: answer\)",
        ),
        ({"prompt": "", "answer": "4"}, "line 3: `prompt` is ''; expected"),
        ({"prompt": "x"}, "line 3: `answer` is None; expected a text or a number"),
        ({"prompt": "x", "answer": True}, "line 3: `answer` is True; expected a text or a number"),
        (
            {"messages": [], "answer": "4"},
            r"line 3: `messages` is \[\]; expected a list of at least one message",
        ),
        (
            {"messages": [{"content": "x"}], "answer": "4"},
            r"line 3: `messages` holds \{'content': 'x'\}; expected messages like",
        ),
        (
            {"messages": [{"role": "assistant", "content": "4"}], "answer": "4"},
            "line 3: `messages` ends with an assistant message; expected",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_number_its_value_and_what_was_expected(
    tmp_path: Path, line: Any, words: str
) -> None:
    path = written(tmp_path / "t.jsonl", *prompts("a"), "", line)
    with pytest.raises(UserError, match=words) as caught:
        load_task(settings_of(path))
    assert (
        str(caught.value).startswith(str(path))
        and caught.value.next_step == "Correct or remove it."
    )


def test_without_verification_no_answers_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", {"prompt": "x"})
    assert load_task(settings_of(path, enabled=False)).train(0).info == {}


def test_a_scorer_of_ones_own_gets_every_other_key_of_the_line(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", {"prompt": "x", "answer": [1, 2], "tests": {"in": 1}})
    assert load_task(settings_of(path, scorer=MINE)).train(0).info == {
        "answer": [1, 2],
        "tests": {"in": 1},
    }


def test_the_example_is_a_task_whose_answers_are_right() -> None:
    settings = load_settings([ROOT / "examples/jsonl/onstream.toml"], [], {})
    path = settings.task.path
    assert path is not None
    task = load_task(
        settings.model_copy(update={"task": settings.task.model_copy(update={"path": ROOT / path})})
    )
    problems = [task.train(index) for index in range(30)] + [
        task.held_out(index) for index in range(task.held_out_size)
    ]
    assert task.held_out_size == 8
    for problem in problems:
        assert problem.messages == [
            {"role": "user", "content": f"Reverse: {problem.info['answer'][::-1]}"}
        ]


def test_an_empty_a_missing_and_an_unnamed_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"empty.jsonl is empty; expected at least one line with a problem"
    ):
        load_task(settings_of(written(tmp_path / "empty.jsonl", "", " ")))
    with pytest.raises(UserError, match=r"none.jsonl cannot be read: No such file or directory"):
        load_task(settings_of(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"without `task.path`"):
        load_task(Settings.model_validate({"task": {"name": "jsonl"}}))


def test_arguments_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"`task.args` = \{'min_length': 3\} of task `jsonl`; expected none"
    ):
        load_task(settings_of(written(tmp_path / "t.jsonl", *prompts("a")), args={"min_length": 3}))
