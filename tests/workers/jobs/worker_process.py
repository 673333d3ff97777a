"""A jobs worker in a process of its own, with jobs that misbehave: `python -m
tests.workers.jobs.worker_process URL SETTINGS_JSON`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import connect
from onstream.pipeline.redis.job_queue import FUNCTIONS
from onstream.settings.root import Settings
from onstream.workers.jobs.functions import job

NAMES = ("hang", "flaky", "hopeless", "slow", "daemon", "answer")


def answer(value: Any) -> dict[str, Any]:
    return {"value": value}


def hang(started: str) -> None:
    """Ignores RQ's own limit and every polite signal, and has a child in a session of its own."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(started).write_text(f"{os.getpid()} {child.pid}")
    while True:
        time.sleep(60)


def daemon(started: str) -> str:
    """Ends at once, and leaves a process behind that nobody is the parent of."""
    if not os.fork():
        os.setsid()
        if not os.fork():
            Path(started).write_text(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    os.wait()
    while not Path(started).exists() or not Path(started).read_text():
        time.sleep(0.01)
    return "left"


def flaky(path: str) -> str:
    """Fails the first time."""
    if not Path(path).exists():
        Path(path).touch()
        raise RuntimeError("the first time fails")
    return "done"


@job
def hopeless(path: str) -> None:
    with Path(path).open("a") as file:
        file.write("tried\n")
    raise UserError("this", expected="that", next_step="Mend it.")


def slow(path: str) -> str:
    """Takes long the first time, and no time at all when it is tried again."""
    if not Path(path).exists():
        Path(path).touch()
        time.sleep(600)
    return "done"


FUNCTIONS.update({name: f"tests.workers.jobs.worker_process.{name}" for name in NAMES})


def main() -> None:
    from onstream.workers.jobs.worker import run_jobs

    url = sys.argv[1]
    settings = Settings.model_validate_json(sys.argv[2])
    sys.exit(run_jobs(settings, connect(settings, url, consumer=f"jobs-{os.getpid()}"), url))


if __name__ == "__main__":
    main()
