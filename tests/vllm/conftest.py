from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from onstream.settings.root import Settings
from onstream.workers.generator.student import Student, open_student
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from tests.vllm.server import VllmServer

HERE = Path(__file__).parent


def on_vllm(model: Path, **inference: Any) -> Settings:
    """Settings of a generator that serves `model` by vLLM, on the CPU."""
    given = {
        "engine": "vllm",
        "max_batch": 64,
        "prefetch": 32,
        "sampling": {"max_completion": 200},
        **inference,
    }
    return Settings.model_validate(
        {"model": {"name": str(model)}, "deployment": {"device": "cpu"}, "inference": given}
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs vLLM: `make test-vllm` installs it and runs this"
                    )
                )


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose weights are wide enough that its distributions are not flat."""
    return write_fresh(
        tmp_path_factory.mktemp("teacher"),
        ModelShape(hidden=64, layers=2, intermediate=128),
        seed=7,
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the same vocabulary."""
    return write_fresh(
        tmp_path_factory.mktemp("student"),
        ModelShape(hidden=64, layers=2, intermediate=128),
        seed=8,
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def student(student_dir: Path) -> Iterator[Student]:
    """The student on a real vLLM in this process and its children, started once for the session;
    its version 0 is `student_dir`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's imports warn of what torch deprecates
        student = open_student(on_vllm(student_dir))
    try:
        yield student
    finally:
        student.engine.close()


@pytest.fixture(scope="session")
def server(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real server of the teacher, started once for the session."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = VllmServer(teacher_dir, tmp_path_factory.mktemp("vllm") / "vllm.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
