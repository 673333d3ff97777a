"""The `hf:` task over local files and directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import load_scorer, load_task
from onstream.settings.root import Settings

ROWS = {
    "prompt": [f"q{number}" for number in range(10)],
    "answer": list(range(10)),
    "level": ["easy"] * 10,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached outside of the test, and nothing is asked of a network."""
    # Imported where it is used: it takes a second, and pytest reads this file in every process.
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def settings_of(path: Path, *, samples: int = 2, **task: Any) -> Settings:
    return Settings.model_validate(
        {"task": {"name": f"hf:{path}", **task}, "eval": {"samples": samples}}
    )


def saved(path: Path, rows: dict[str, list[Any]] = ROWS) -> Path:
    import datasets

    dataset = datasets.Dataset.from_dict(rows)
    match path.suffix:
        case ".parquet":
            dataset.to_parquet(path)
        case ".jsonl":
            dataset.to_json(path)
        case ".csv":
            dataset.to_csv(path)
        case _:
            dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "directory"])
def test_a_local_data_set_is_trained_on_but_for_its_last_rows(tmp_path: Path, name: str) -> None:
    settings = settings_of(saved(tmp_path / name))
    task = load_task(settings)
    assert [task.held_out(index).info for index in range(task.held_out_size)] == [
        {"answer": "8"},
        {"answer": "9"},
    ]
    trained = [task.train(index) for index in range(16)]
    assert sorted(problem.info["answer"] for problem in trained[:8]) == [
        str(number) for number in range(8)
    ]
    assert all(
        problem.messages == [{"role": "user", "content": "q" + problem.info["answer"]}]
        for problem in trained
    )
    assert load_scorer(settings)("7", {"answer": "7"}) == {"reward": 1.0, "similarity": 1.0}


def test_rows_that_ask_the_same_as_a_held_out_one_are_not_trained_on(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "t.parquet",
        {"prompt": ["a", "b", "a", "c", "b"], "answer": ["1", "2", "3", "4", "5"]},
    )
    task = load_task(settings_of(path))
    assert {task.train(index).messages[0]["content"] for index in range(12)} == {"a"}


def test_another_split_can_be_held_out(tmp_path: Path) -> None:
    import datasets

    splits = {
        "train": datasets.Dataset.from_dict(ROWS),
        "test": datasets.Dataset.from_dict({"prompt": ["q3", "t"], "answer": ["3", "t"]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    task = load_task(settings_of(tmp_path / "both", args={"eval_split": "test"}))
    assert [task.held_out(index).info["answer"] for index in range(2)] == ["3", "t"]
    assert {task.train(index).info["answer"] for index in range(40)} == set("012456789")


def test_a_scorer_of_ones_own_gets_every_other_column(tmp_path: Path) -> None:
    task = load_task(
        settings_of(
            saved(tmp_path / "t.parquet"), scorer="tests.workers.verifier.misbehaving:score"
        )
    )
    info = task.train(0).info
    assert info == {"answer": info["answer"], "level": "easy"} and isinstance(info["answer"], int)


def test_a_row_that_is_no_problem_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.parquet", {"prompt": ["a", "", "c"], "answer": ["1", "2", "3"]})
    with pytest.raises(
        UserError, match=r"t.parquet \[train\] row 1: `prompt` is ''; expected `messages` or a text"
    ):
        load_task(settings_of(path, samples=0))


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("nowhere", {}, r"hf:.*nowhere, split 'train', cannot be used: \w+"),
        (
            "t.parquet",
            {"args": {"eval_split": "test", "no_such_option": 1}},
            "cannot be used: .*no_such_option",
        ),
    ],
)
def test_a_data_set_that_cannot_be_loaded_says_why(
    tmp_path: Path, name: str, task: dict[str, Any], words: str
) -> None:
    saved(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=words):
        load_task(settings_of(tmp_path / name, **task))


def test_a_slice_of_a_split_is_a_smaller_data_set(tmp_path: Path) -> None:
    task = load_task(settings_of(saved(tmp_path / "t.parquet"), split="train[2:5]", samples=1))
    assert {task.train(index).info["answer"] for index in range(8)} == {"2", "3"}
    assert task.held_out(0).info == {"answer": "4"}


@pytest.mark.parametrize(
    ("rows", "split"), [({"prompt": [], "answer": []}, "train"), (ROWS, "train[:0]")]
)
def test_an_empty_data_set_is_refused(
    tmp_path: Path, rows: dict[str, list[Any]], split: str
) -> None:
    with pytest.raises(UserError, match=r"cannot be used: .* no data!"):
        load_task(settings_of(saved(tmp_path / "t.parquet", rows), split=split))


def test_holding_out_every_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none to train on"):
        load_task(settings_of(saved(tmp_path / "t.parquet"), samples=10))


def test_a_hub_that_is_out_of_reach_is_told_in_plain_words(tmp_path: Path) -> None:
    """In a process of its own: the library reads the hub's address once."""
    code = (
        "from onstream.pipeline.tasks import load_task\n"
        "from onstream.settings.load import load_settings\n"
        "load_task(load_settings(overrides=['task.name=hf:some/thing'], environ={}))"
    )
    environ = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environ |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert "the hub is out of reach, and the data set is not in the local cache" in done.stderr
    assert "Retrying" not in done.stderr


def test_the_fields_of_a_csv_file_are_texts_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('prompt,answer,note\n"None, or 1?",007,x\nNA,1.50,\n"two\nlines",-0,y\n')
    task = load_task(settings_of(path, samples=0))
    problems = [task.train(index) for index in range(3)]
    assert {problem.messages[0]["content"]: problem.info["answer"] for problem in problems} == {
        "None, or 1?": "007",
        "NA": "1.50",
        "two\nlines": "-0",
    }


def test_a_csv_file_with_another_separator_is_read_by_the_librarys_own_argument(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("question;solution\na;01\nb;2\n")
    task = load_task(
        settings_of(
            path, samples=0, prompt_field="question", answer_field="solution", args={"sep": ";"}
        )
    )
    assert {task.train(index).info["answer"] for index in range(2)} == {"01", "2"}


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"prompt": ["a", None], "answer": ["1", "2"]}, "row 1: `prompt` is None"),
        ({"prompt": ["a", "b"], "answer": ["1", None]}, "row 1: `answer` is None; expected a text"),
        ({"question": ["a"], "answer": ["1"]}, r"keys here: answer, question"),
    ],
)
def test_a_missing_field_of_a_file_is_named(
    tmp_path: Path, name: str, rows: dict[str, list[Any]], words: str
) -> None:
    import datasets

    file = tmp_path / name
    dataset = datasets.Dataset.from_dict(rows)
    if file.suffix == ".csv":
        dataset.to_csv(file, index=False)
    else:
        dataset.to_parquet(file)
    with pytest.raises(UserError, match=words):
        load_task(settings_of(file, samples=0))


def test_another_file_can_be_held_out(tmp_path: Path) -> None:
    held_out = saved(tmp_path / "test.csv", {"prompt": ["q3", "t"], "answer": ["3", "t"]})
    task = load_task(settings_of(saved(tmp_path / "t.parquet"), eval_path=held_out))
    assert [task.held_out(index).info["answer"] for index in range(2)] == ["3", "t"]
    assert {task.train(index).info["answer"] for index in range(40)} == set("012456789")


@pytest.mark.parametrize(
    ("name", "task"),
    [("t.parquet", {"args": {"eval_split": "test"}}), ("directory", {"eval_path": "t.parquet"})],
)
def test_what_is_held_out_is_a_file_of_files_and_a_split_of_splits(
    tmp_path: Path, name: str, task: dict[str, Any]
) -> None:
    saved(tmp_path / name)
    with pytest.raises(
        UserError, match=r"`task\.eval_path` for a local file, `task\.args\.eval_split`"
    ):
        load_task(settings_of(tmp_path / name, **task))
