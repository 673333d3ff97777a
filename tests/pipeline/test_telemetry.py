"""Log lines: their form, and what each one carries."""

from __future__ import annotations

import io
import json
import logging
import threading
import time

from onstream.pipeline import telemetry
from onstream.settings.sections.run import LogSettings


def configured(**log: str) -> io.StringIO:
    stream = io.StringIO()
    telemetry.configure(
        "verify", "verify-1", "mine", LogSettings.model_validate(log), stream=stream
    )
    return stream


def test_a_json_line_carries_run_stage_and_worker_and_the_uid_of_its_rollout() -> None:
    stream = configured(format="json")
    telemetry.get_logger().warning("scorer failed", number=12, reason="ü")
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "run": "mine",
        "stage": "verify",
        "worker": "verify-1",
        "event": "scorer failed",
        "level": "warning",
        "number": 12,
        "reason": "ü",
    }


def test_the_last_error_is_remembered_with_its_cause() -> None:
    configured(format="json")
    telemetry.get_logger().error("no checkpoint could be written", error="disk full")
    try:
        raise ValueError("bad shape")
    except ValueError:
        telemetry.get_logger().exception("the worker failed")
    telemetry.get_logger().warning("all is well again")
    error = telemetry.last_error()
    assert error is not None
    assert error.text == "the worker failed: bad shape"
    assert abs(error.time - time.time()) < 5


def test_lines_of_other_threads_and_of_libraries_take_the_same_form() -> None:
    stream = configured(format="json")
    logger = telemetry.get_logger()
    thread = threading.Thread(target=lambda: logger.info("from a thread"))
    thread.start()
    thread.join()
    logging.getLogger("library").warning("from %s", "a library")
    logging.getLogger("library").info("chatter")
    own, foreign = map(json.loads, stream.getvalue().splitlines())
    assert (own["event"], own["run"], own["worker"]) == ("from a thread", "mine", "verify-1")
    assert (foreign["event"], foreign["level"], foreign["logger"], foreign["run"]) == (
        "from a library",
        "warning",
        "library",
        "mine",
    )


def test_auto_is_json_where_there_is_no_terminal_and_lines_below_the_level_are_left_out() -> None:
    stream = configured(level="warning")
    telemetry.get_logger().info("quiet")
    telemetry.get_logger().error("loud")
    [line] = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "loud"


def test_console_lines_are_text_and_a_traceback_shows_no_local_variables() -> None:
    stream = configured(format="console")
    try:
        password = "hunter2"
        raise ValueError(len(password))
    except ValueError:
        telemetry.get_logger().exception("broke", number=3)
    text = stream.getvalue()
    assert "broke" in text and "number=3" in text and "ValueError: 7" in text
    assert "hunter2" not in text
