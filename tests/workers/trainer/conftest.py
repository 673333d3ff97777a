"""A tiny student, and runs that train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.redis.bus import Bus
from tests.tiny import write_tiny
from tests.workers.trainer.driver import Run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny student."""
    return write_tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture
def run(bus: Bus, model: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts the test's run, with the settings it is given."""
    runs: list[Run] = []

    def start(**changes: Any) -> Run:
        runs.append(Run(bus, model, tmp_path, **changes))
        return runs[-1]

    yield start
    for job in runs:
        job.close_files()
