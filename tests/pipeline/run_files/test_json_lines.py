"""Files of JSON lines that a resume cuts back."""

import json
import resource
import signal
from pathlib import Path

import pytest

from onstream.pipeline.run_files.json_lines import JsonLines, cut


def rows(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_readable_as_soon_as_they_are_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    assert rows(lines.path) == [{"step": 1}]
    lines.write({"step": 2})
    lines.sync()
    lines.close()
    assert rows(lines.path) == [{"step": 1}, {"step": 2}]


def test_a_file_is_cut_before_the_first_line_past_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"step":3}\n{"step":4}\n')
    assert cut(path, lambda row: row["step"] <= 2) == 2
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_line_goes_with_all_that_follow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st\x00\x00\n{"step":3}\n')
    assert cut(path, lambda row: True) == 2
    path.write_bytes(b'{"step":1}\n{"step":2}')
    assert cut(path, lambda row: True) == 1
    assert rows(path) == [{"step": 1}]


def test_nothing_is_cut_where_there_is_no_file(tmp_path: Path) -> None:
    assert cut(tmp_path / "none.jsonl", lambda row: False) == 0


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20, hard)
    )  # the second line is then written in part, as on a full disk
    try:
        with pytest.raises(OSError):
            lines.write({"step": 2, "words": "more than fits"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    lines.write({"step": 2})
    lines.close()
    assert rows(lines.path) == [{"step": 1}, {"step": 2}]
