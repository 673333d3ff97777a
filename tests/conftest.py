"""Fixtures of all tests: one real Redis for the session, and a name of a run for each test."""

from __future__ import annotations

import logging
import os
import random
import sys
import uuid
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import hypothesis
import pytest
import structlog

from onstream.pipeline.redis.bus import Bus
from onstream.workers.launcher.embedded_redis import EmbeddedRedis

# Workers that a test starts find the test's own modules: they search no working directory.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# Models of tests are tiny. Threads of theirs gain nothing where they are alone, and wait for each
# other most of the time where they are not. Read when torch is imported, here and in children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time, since a test that fails one time in many is of no use to whoever
# happens to run it.
hypothesis.settings.register_profile("onstream", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("onstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of `rotates` groups that are another day's, where ROTATE_TESTS is set.

    CI sets it. They are long runs of much the same, and all of them together take too long there.
    """
    if not os.environ.get("ROTATE_TESTS"):
        return
    today = date.today().toordinal()
    for item in items:
        for mark in item.iter_markers("rotates"):
            group, place, of = mark.args
            if today % of != place:
                reason = f"{group}: one of {of} a day, and this one is another day's"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test that draws at random draws the same every time."""
    random.seed(0)
    if torch := sys.modules.get("torch"):  # tests that do not use it should not wait for it
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A worker's process configures its log once and for all; a test must not leave its own, closed
    by then, to the next one.
    """
    handlers = logging.root.handlers[:]
    level = logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.level = level
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real server, started for this session."""
    server = EmbeddedRedis(Path(tmp_path_factory.mktemp("redis")), max_memory_mb=512)
    yield server.start()
    server.stop()


@pytest.fixture
def run_name() -> str:
    """The name of a run that nothing else uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def bus(redis_url: str, run_name: str) -> Iterator[Bus]:
    """A bus of the run `run_name`, as the consumer `tester`."""
    bus = Bus.connect(redis_url, run_name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()
