"""What a teacher reads in place of the student's prompt, and of which problems it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "2+2?"}
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, ASKED]


def task_settings(path: Path, row: dict[str, Any], **teacher_prompt: Any) -> Settings:
    path.write_text(json.dumps(row) + "\n")
    task = {"name": "jsonl", "path": path, "teacher_prompt": teacher_prompt}
    return Settings.model_validate({"task": task, "eval": {"samples": 0}})


@pytest.mark.parametrize(
    ("messages", "teacher_prompt", "expected"),
    [
        ([ASKED], {}, None),
        ([SYSTEM, ASKED], {}, None),
        ([ASKED], {"template": "{prompt} It is {answer}."}, [("user", "2+2? It is 4.")]),
        ([ASKED], {"template": "{way}: {{x}} {prompt}"}, [("user", "count {on}: {x} 2+2?")]),
        ([ASKED], {"system": "Think."}, [("system", "Think."), ("user", "2+2?")]),
        ([SYSTEM, ASKED], {"system": "Think."}, [("system", "Think."), ("user", "2+2?")]),
        (
            [SYSTEM, *CHAT],
            {"examples": [{"prompt": "3+3?", "answer": "6"}], "template": "{prompt} ({answer})"},
            [
                ("system", "Be brief."),
                ("user", "3+3?"),
                ("assistant", "6"),
                ("user", "1+1?"),
                ("assistant", "2"),
                ("user", "2+2? (4)"),
            ],
        ),
    ],
)
def test_the_teacher_reads_what_the_settings_put_around_the_students_messages(
    tmp_path: Path,
    messages: list[dict[str, str]],
    teacher_prompt: dict[str, Any],
    expected: list[tuple[str, str]] | None,
) -> None:
    row = {"messages": messages, "answer": 4, "way": "count {on}"}
    problem = load_task(task_settings(tmp_path / "t.jsonl", row, **teacher_prompt)).train(0)
    found = problem.teacher_messages
    read = None if found is None else [(one["role"], one["content"]) for one in found]
    assert (read, problem.messages) == (expected, messages)
    assert problem.info == {"answer": "4"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "2+2?", "answer": "4"},
            r"t\.jsonl line 1: `way`, which task\.teacher_prompt\.template shows, is missing; "
            r"expected a text or a number \(names here: answer, prompt\)",
        ),
        ({"prompt": "2+2?", "answer": "4", "way": ["count"]}, r"shows, is .\['count'\].; expected"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]}
            | {"answer": "4", "way": "count"},
            "line 1: a message has parts, which may be images; expected texts alone",
        ),
    ],
)
def test_a_row_of_which_no_teachers_prompt_can_be_made_is_named(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_task(task_settings(tmp_path / "t.jsonl", row, template="{prompt} {way}"))


def test_a_built_in_task_shows_its_answer_and_names_what_else_there_is() -> None:
    task = {"name": "reverse-text", "teacher_prompt": {"template": "{prompt} {answer}"}}
    problem = load_task(Settings.model_validate({"task": task})).train(0)
    word = problem.messages[0]["content"].removeprefix("Reverse: ")
    assert problem.teacher_messages == [
        {"role": "user", "content": f"Reverse: {word} {word[::-1]}"}
    ]
    task["teacher_prompt"] = {"template": "{prompt} {solution}"}
    with pytest.raises(UserError, match=r"`solution`.* is missing.*names here: answer, prompt"):
        load_task(Settings.model_validate({"task": task}))
