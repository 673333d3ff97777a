"""The last lines of a worker's log."""

from __future__ import annotations

from pathlib import Path

from onstream.workers.launcher.log_tail import as_text, last_lines


def test_the_last_lines_of_a_log_leave_out_blank_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\n\nb\nc\n\n")
    assert last_lines(log, 2) == ["b", "c"]
    assert last_lines(tmp_path / "none") == []


def test_a_json_line_becomes_text_with_its_traceback() -> None:
    line = (
        '{"run": "demo", "stage": "train", "event": "stopped", "level": "error", "uid": "demo/7", '
        '"exception": "Traceback:\\nKeyError: 3"}'
    )
    assert as_text(line) == ["error: stopped uid='demo/7'", "Traceback:", "KeyError: 3"]


def test_a_line_that_is_no_json_stays() -> None:
    assert as_text("Killed") == ["Killed"]
    assert as_text("12") == ["12"]
