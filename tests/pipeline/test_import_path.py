"""Functions of the user's own are found in the working directory, after all else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.import_path import import_function


def test_a_function_is_found_by_its_module_and_name() -> None:
    assert import_function("json:dumps", setting="task.scorer")([1]) == "[1]"
    assert import_function("os:path.basename", setting="task.scorer")("/a/b") == "b"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module:score", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_function", "AttributeError: module 'json' has no attribute"),
        ("sys:path", "it is a list"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_setting_and_reason(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        import_function(path, setting="trainer.loss.function")

    assert caught.value.got.startswith(f"`trainer.loss.function` = {path!r} cannot be used: ")
    assert caught.value.next_step.startswith("Put its module in ")


def test_the_working_directory_comes_last_and_its_modules_find_one_another(tmp_path: Path) -> None:
    # given: a module named like one of ours' dependencies, and one that only the user has
    (tmp_path / "redis.py").write_text("raise SystemExit('the wrong redis')\n")
    (tmp_path / "own_words.py").write_text("WORD = 'mine'\n")
    (tmp_path / "scorer.py").write_text("import redis, own_words\ndef f(): return own_words.WORD\n")
    # when
    program = (
        "from onstream.pipeline.import_path import import_function as find;"
        "print(find('scorer:f', setting='task.scorer')())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    # then
    assert (done.stdout, done.stderr) == ("mine\n", "")
