"""A tiny student, and runs that train it.

What brings torch and transformers is imported by the fixtures that need it: pytest reads this file
for the tests of maths and batches too, in each of its processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onstream.pipeline.redis.bus import Bus

if TYPE_CHECKING:
    from tests.workers.trainer.driver import Run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny student."""
    from tests.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture
def run(bus: Bus, model: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts the test's run, with the settings it is given."""
    from tests.workers.trainer.driver import Run

    runs: list[Run] = []

    def start(**changes: Any) -> Run:
        runs.append(Run(bus, model, tmp_path, **changes))
        return runs[-1]

    yield start
    for job in runs:
        job.close_files()


@pytest.fixture(scope="session")
def undisturbed(redis_url: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the weights at the end of a run that nothing happened to."""
    from tests.workers.trainer.driver import digest, twin_to_the_end

    directory = tmp_path_factory.mktemp("undisturbed")
    with twin_to_the_end(
        redis_url, f"test-{directory.name}-{os.getpid()}", model, directory
    ) as job:
        return digest(job.bus)


@pytest.fixture
def stand_in_for_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny student takes prompts with images, and looks at none."""
    from onstream.workers.trainer import learner

    monkeypatch.setattr(learner.Learner, "check", lambda *_: None)
    pack = learner.Learner.pack

    def without_images(self: Any, prompts: Any, completions: Any, _: Any = None) -> Any:
        return pack(self, prompts, completions)

    monkeypatch.setattr(learner.Learner, "pack", without_images)
