"""An engine, the images, and projects that leave nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compose.project import ROOT, Project, ran

ENGINE = Path(__file__).parent / "engine.sh"
STAND_INS = {
    "BASE_IMAGE": "onstream-base/python:3.11",
    "REDIS_IMAGE": "onstream-base/redis:7",
    "BUILD_NETWORK": "host",
}


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers: the one that is there, or one that is made for these tests."""
    if not _answers():
        if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
            _without("no Docker engine answers, and only root on Debian can make one here")
        made = subprocess.run([str(ENGINE), "up"], stdout=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            _without("no Docker engine answers, and none could be made (see above)")
        os.environ["DOCKER_HOST"] = made.stdout.split()[-1]
        assert _answers()


def _answers() -> bool:
    if not shutil.which("docker") or not (
        shutil.which("docker-compose") or _succeeds("docker", "compose", "version")
    ):
        return False
    return _succeeds("docker", "version")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _without(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def variables(engine: None) -> dict[str, str]:
    """What every project's `.env` says: the images, built here; from stand-ins where Docker's own
    are not there.
    """
    stand_ins = (
        STAND_INS if _succeeds("docker", "image", "inspect", STAND_INS["BASE_IMAGE"]) else {}
    )
    return {
        "IMAGE": "onstream-test",
        **stand_ins,
        **{name: os.environ[name] for name in STAND_INS if name in os.environ},
    }


@pytest.fixture(scope="session")
def images(variables: dict[str, str]) -> dict[str, str]:
    """The variables, once the images `slim` and `cpu` are built."""
    program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    ran(
        [*program, "-p", "onstream-test", "build", "prepare", "trainer"],
        cwd=ROOT,
        env={**os.environ, **variables},
    )
    return variables


MakeProject = Callable[..., Project]


@pytest.fixture(scope="module")
def project(
    images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeProject]:
    """Makes projects: `project(*files, **variables)`. All that they leave in the engine goes at the
    end.
    """
    made: list[Project] = []

    def make(*files: Path, **variables: str) -> Project:
        name = f"onstream-{uuid.uuid4().hex[:8]}"
        made.append(Project(tmp_path_factory.mktemp("compose") / name, images | variables, files))
        return made[-1]

    yield make
    for one in made:
        one.down()
