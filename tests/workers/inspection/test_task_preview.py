"""`onstream data`: prompts as the student reads them, their lengths, and what is asked twice."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.workers.commands.cli import main
from onstream.workers.inspection.task_preview import Lengths, preview

STUDENT = str(Path("examples/reverse-text/student").absolute())
FORM = "<|im_start|><|user|>{}<|im_end|><|im_start|><|assistant|>"


def written(path: Path, *questions: str) -> Path:
    lines = [json.dumps({"prompt": question, "answer": question[::-1]}) for question in questions]
    path.write_text("\n".join(lines))
    return path


def shown(settings: dict[str, Any], *, prompts: int = 1, sample: int = 100) -> str:
    """What is printed, on 80 columns, with one space between words."""
    out = StringIO()
    preview(
        Settings.model_validate({"model": {"name": STUDENT}, **settings}),
        Console(file=out, width=80),
        prompts=prompts,
        sample=sample,
    )
    assert all(len(line.rstrip()) <= 80 for line in out.getvalue().splitlines())
    return " ".join(out.getvalue().split())


def jsonl(path: Path, **settings: Any) -> dict[str, Any]:
    return {"task": {"name": "jsonl", "path": path}, "eval": {"samples": 2}, **settings}


def test_the_first_prompts_are_shown_as_the_student_reads_them(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", "[red]abc", "[red]abc", "[red]abc", "held", "out")
    text = shown(jsonl(path), prompts=2)
    assert f"Prompt 2, 13 tokens {FORM.format('[red]abc')} Its answer: cba]der[" in text
    assert "Prompt 3" not in text


def test_what_the_teacher_reads_is_shown_beside_them(tmp_path: Path) -> None:
    settings = jsonl(written(tmp_path / "p.jsonl", "abc", "abc", "held", "out"))
    settings["task"]["teacher_prompt"] = {"template": "{prompt} is {answer}"}
    text = shown(settings)
    asked, viewed = FORM.format("abc"), FORM.format("abc is cba")
    assert (
        f"Prompt 1, 8 tokens {asked} Prompt 1 as the teacher reads it, 15 tokens {viewed}" in text
    )
    assert "as the teacher reads them 2 15 15 15 15" in text


def test_what_is_asked_twice_is_counted(tmp_path: Path) -> None:
    rows = ["abc", "def", "abc", "held", "HELD ", "out", "ghi", "held", "out"]
    text = shown(jsonl(written(tmp_path / "p.jsonl", *rows)))
    assert "held out 2 other rows 7" in text
    assert "that ask what a held-out one asks: not trained on 2" in text
    assert "that do so but for case and white space: trained on 1" in text
    assert "that ask what an earlier row asks 1" in text


def test_prompts_that_leave_too_little_room_are_counted(tmp_path: Path) -> None:
    """A letter is a token, and the student's context has 512."""
    path = written(tmp_path / "p.jsonl", "a", "b" * 450, "c" * 600, "d" * 600, "e")
    text = shown(jsonl(path, inference={"sampling": {"max_completion": 100}}), sample=3)
    assert "up to 100 tokens, and with its prompt up to 512, the student's context." in text
    assert "Prompts trained on that leave less: 1; the first is cut off after 57 tokens." in text
    assert "Prompts trained on that do not fit: 1; each becomes a dead letter." in text
    assert "Prompts held out that do not fit: 1; an evaluation stops at the first." in text


def test_a_prompt_that_the_student_cannot_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    row = {"messages": [{"role": "user", "content": [picture]}], "answer": "1"}
    path.write_text("\n".join([json.dumps(row)] * 2))
    text = shown({**jsonl(path), "eval": {"samples": 0}})
    assert "Prompt 1 cannot be read: the prompt holds images and the student reads none" in text
    assert "Prompts trained on that cannot be read: 2; each becomes a dead letter." in text


def test_a_task_that_draws_its_problems_has_no_end() -> None:
    text = shown({"task": {"name": "arithmetic"}, "eval": {"samples": 7}}, prompts=0, sample=9)
    assert "trained on 9 " in text
    assert "held out 7 to train on, drawn at random; none that is held out no end" in text


def test_the_summary_of_lengths_is_by_rank() -> None:
    assert Lengths(list(range(1, 101))).summary == ("100", "1", "50", "95", "100")
    assert Lengths([7]).summary == ("1", "7", "7", "7", "7")
    assert Lengths().summary == ("0", "", "", "", "")


def test_the_command_reads_the_files_of_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "p.jsonl", "abc", "def", "ghi")
    (tmp_path / "my.toml").write_text(
        f'[model]\nname = "{STUDENT}"\n[task]\nname = "jsonl"\npath = "p.jsonl"\n'
        "[eval]\nsamples = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "my.toml", "--prompts", "1"])
    assert ended.value.code == 0
    assert "Prompt 1, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.toml", None, "no file nowhere.toml in"),
        ("p.jsonl", '{"prompt": "a"}', "p.jsonl: Invalid statement"),
        ("my.toml", '[task]\nname = "jsonl"\npath = "gone.jsonl"\n', "gone.jsonl"),
    ],
)
def test_a_wrong_file_is_told_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    words: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", name])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and words in told and len(told.splitlines()) == 1


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"answer": 2}\n')
    with pytest.raises(UserError, match=r"p\.jsonl line 2: `prompt` is None"):
        shown(jsonl(path))
