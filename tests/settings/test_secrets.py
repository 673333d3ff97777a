"""Users, passwords and keys in settings: where they must not be seen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onstream.settings.check import Findings, report
from onstream.settings.fields import without_login
from onstream.settings.load import load_settings, resolve
from onstream.settings.problems import SettingsError
from onstream.settings.rules import warnings_of
from onstream.settings.toml import toml_text

CLIENT = "orchestrator.teacher_model.client"
LOGIN = "http://me:s3cret@teacher:8000/v1"
TEACHER = ["orchestrator.teacher_model.model.name=m", f"{CLIENT}.base_url={LOGIN}"]


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (LOGIN, "http://***@teacher:8000/v1"),
        ("http://teacher:8000/v1", "http://teacher:8000/v1"),
        ("me:s3c/r@t@teacher", "***@teacher"),
        ('["http://me:s3cret@a", "http://b"]', '["http://***@a", "http://b"]'),
        (7, 7),
    ],
)
def test_a_login_in_an_address_is_not_shown(value: Any, seen: Any) -> None:
    assert without_login(value) == seen


def test_a_login_in_an_address_is_used_and_kept_out_of_check_and_of_the_runs_file(
    tmp_path: Path,
) -> None:
    settings = load_settings(overrides=TEACHER, environ={})
    client = settings.orchestrator.teacher_model.client  # type: ignore[union-attr]
    assert client.base_url == (LOGIN,)

    printed = io.StringIO()
    resolved = resolve(overrides=TEACHER, environ={})
    report(resolved, Findings(), Console(file=printed, width=200), everything=True)
    kept = tmp_path / "settings.toml"
    kept.write_text(toml_text(settings))

    for text in (printed.getvalue(), kept.read_text()):
        assert "http://***@teacher:8000/v1" in text
        assert "s3cret" not in text and "me:" not in text
    again = load_settings([kept], environ={}).orchestrator.teacher_model
    assert again is not None and again.client.base_url == ("http://teacher:8000/v1",)


@pytest.mark.parametrize(
    ("environ", "overrides"),
    [
        ({"ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT__HEADERS": "x: s3cret"}, []),
        ({"ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT__HEADERS": '["s3cret"]'}, []),
        ({"ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT__HEADERS": '{"x": ["s3cret"]}'}, []),
        ({"ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT": "s3cret"}, []),
        ({}, [f"{CLIENT}.headers=x: s3cret"]),
        ({}, [f'{CLIENT}.headers.x=[1, "s3cret"]']),
        ({}, [f'{CLIENT}.api_key=["s3cret"]']),
        ({}, [f"{CLIENT}=s3cret"]),
        ({}, [f"{CLIENT}.base_url=htp://me:s3cret@teacher"]),
        ({}, [f'{CLIENT}.base_url=["me:s3cret@teacher"]']),
        ({"ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT__BASE_URL": "me:s3cret@teacher"}, []),
        ({}, [f"{CLIENT}.base_url=http://me:s3cret/with@teacher"]),
        ({"ONSTREAM_REDIS": "s3cret"}, []),
        ({}, ['redis.url=["s3cret"]']),
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_it(
    environ: dict[str, str], overrides: list[str]
) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(overrides=[TEACHER[0], *overrides], environ=environ)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("redis", "warned"),
    [
        (["redis.url=redis://far:6379/0"], True),
        (["redis.url=rediss://far:6379/0"], True),
        (["redis.url=redis://user@far:6379/0"], True),
        (["redis.url=redis://:s3cret@far:6379/0"], False),
        (["redis.url=redis://far:6379/0", "redis.password=s3cret"], False),
        (["redis.url=redis://127.0.0.1:6379/0"], False),
        (["redis.url=redis://localhost/0"], False),
        (["redis.url=unix:///run/redis.sock"], False),
        ([], False),
    ],
)
def test_a_redis_on_another_machine_without_a_password_is_warned_of(
    redis: list[str], warned: bool
) -> None:
    warnings = warnings_of(load_settings(overrides=redis, environ={}))
    told = [text for text in warnings if "Redis" in text]
    assert bool(told) is warned
    assert all("far" in text and "s3cret" not in text for text in told)
