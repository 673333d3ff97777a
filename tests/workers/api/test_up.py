"""`onstream.up` on a real Redis; the workers are the launcher tests' stand-ins."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path

import pytest
import structlog
from rich.console import Console

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.api.up import up
from onstream.workers.launcher import processes
from tests.workers.launcher.test_preflight import make_model


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A run of the stand-ins in `tmp_path`, the student by a path from there."""
    monkeypatch.setattr(processes, "COMMAND", "tests.workers.launcher.stand_in")
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "student")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    overrides = ["run.name=demo", "model.name=student", "trainer.max_steps=3"]
    return load_settings(overrides=overrides)


def test_a_run_goes_to_its_end_and_is_returned(settings: Settings) -> None:
    printed = io.StringIO()
    handlers = logging.root.handlers[:]

    run = up(settings, console=Console(file=printed, width=200))

    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.report()["steps"] == 3
    assert "finished after step 3" in printed.getvalue()
    assert load_settings([run.directory]) == run.settings
    # the process is the user's: it logs as before
    assert logging.root.handlers == handlers
    assert not structlog.is_configured()


def test_a_run_that_fails_raises_with_the_exit_code_of_the_command(settings: Settings) -> None:
    (settings.run_dir / "verify").write_text("exit 2 no such scorer")
    (settings.run_dir / "train").write_text("hold")
    with pytest.raises(UserError, match="run demo ended with exit code 2") as error:
        up(settings, console=Console(file=io.StringIO()))
    assert error.value.exit is Exit.USAGE


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("ONSTREAM_TRAINER__MAX_STEPS", "9", "trainer.max_steps"),
        ("ONSTREAM_REDIS__URL", "redis://elsewhere:1/0", "redis.url"),
    ],
)
def test_settings_that_the_environment_would_change_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{name}, which .* Unset {variable} in the environment"):
        up(settings)
    assert not (settings.run_dir / "settings.toml").exists()


def test_a_secret_that_no_worker_could_read_is_refused_and_not_shown(settings: Settings) -> None:
    secret = load_settings(overrides=["redis.url=redis://me:hunter2@localhost:1/0"])
    with pytest.raises(UserError, match=r"^redis\.url, which") as error:
        up(settings.model_copy(update={"redis": secret.redis}))
    assert "hunter2" not in str(error.value)


def test_another_thread_is_told_that_it_would_not_hear_ctrl_c(settings: Settings) -> None:
    errors: list[UserError] = []

    def call() -> None:
        try:
            up(settings)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "another thread than the main one" in str(errors[0])
