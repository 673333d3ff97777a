"""The task `jsonl`: a file with one problem a line."""

from __future__ import annotations

from pathlib import Path

import msgspec

from onstream.pipeline.errors import UserError, looked_in
from onstream.pipeline.tasks.base import FiniteTask, Problem
from onstream.pipeline.tasks.rows import RowError, RowReader, finite_task, shown
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.root import Settings


def load_jsonl(settings: Settings) -> FiniteTask:
    """The task in `task.path`. Held out is `task.eval_path`, or else the end of `task.path`.

    Raises:
        UserError: there is no file, a line holds no problem, or nothing is left to train on.
    """
    task = settings.task
    reader = RowReader(settings)
    if task.path is None:
        raise UserError(
            "task `jsonl` without `task.path`",
            expected="the path of a JSONL file",
            next_step="Set `task.path`.",
        )
    if task.args:
        raise UserError(
            f"`task.args` = {task.args} of task `jsonl`",
            expected="none",
            next_step="Remove `task.args`.",
        )
    rows = read_problems(task.path, reader)
    held_out = read_problems(task.eval_path, reader) if task.eval_path else None
    return finite_task(rows, held_out, settings, name=str(task.path))


def read_problems(path: Path, reader: RowReader) -> list[Problem]:
    """The problems of the file, one a line; blank lines hold none.

    Raises:
        UserError: the file cannot be read, holds no problem, or has a bad line; the first is named.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{path}{looked_in(path)} cannot be read: {error.strerror}",
            expected="a JSONL file",
            next_step="Correct `task.path` or `task.eval_path`.",
        ) from error
    problems = [
        _problem(path, number, line, reader)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not problems:
        raise UserError(
            f"{path} is empty",
            expected="at least one line with a problem",
            next_step="Add problems, or correct `task.path` or `task.eval_path`.",
        )
    return problems


def _problem(path: Path, number: int, line: bytes, reader: RowReader) -> Problem:
    try:
        return reader.problem(_decoded(line))
    except RowError as error:
        raise error.at(f"{path} line {number}") from error


def _decoded(line: bytes) -> object:
    try:
        return msgspec.json.decode(line)
    except UNDECODABLE as error:
        raise RowError(
            f"{shown(line.decode(errors='replace'))} is not JSON ({error})",
            expected="one JSON object a line",
        ) from error
