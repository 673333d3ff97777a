"""How Redis is reached: its address, its password from the environment or a file, and TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.load import load_settings, resolve
from onstream.settings.redis import address
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text

URL = {"ONSTREAM_REDIS__URL": "redis://redis:6379/0"}


def loaded(**variables: str) -> Settings:
    return load_settings(
        environ=URL | {f"ONSTREAM_REDIS__{name}": value for name, value in variables.items()}
    )


def test_an_address_stays_as_it_is() -> None:
    for url in (
        "redis://user:a%20b@host:6379/3?health_check_interval=5",
        "unix:///run/redis.sock",
        "unix:///run/redis.sock?db=2",
    ):
        assert address(loaded(URL=url).redis) == url
    assert address(Settings().redis) is None


def test_a_password_from_a_file_is_in_the_address_and_in_nothing_that_is_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "password"
    file.write_text("p@ss/word\n")
    settings = loaded(PASSWORD_FILE=str(file))
    assert address(settings.redis) == "redis://:p%40ss%2Fword@redis:6379/0"
    assert "p@ss" not in repr(settings) + toml_text(settings)


def test_an_empty_file_is_no_secret_so_that_a_mount_may_be_there_for_nothing() -> None:
    assert address(loaded(PASSWORD_FILE="/dev/null").redis) == "redis://redis:6379/0"
    assert (
        address(loaded(PASSWORD_FILE="/dev/null", PASSWORD="x").redis) == "redis://:x@redis:6379/0"
    )


def test_files_of_tls_go_into_the_address(tmp_path: Path) -> None:
    settings = loaded(
        URL="rediss://host:6380/0",
        TLS_CA="/tls/ca.pem",
        TLS_CERT="/tls/me.pem",
        TLS_KEY="/tls/me.key",
    )
    assert address(settings.redis) == (
        "rediss://host:6380/0?ssl_ca_certs=%2Ftls%2Fca.pem&ssl_certfile=%2Ftls%2Fme.pem&ssl_keyfile=%2Ftls%2Fme.key"
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"URL": "redis://:one@host/0", "PASSWORD": "two"}, "one password"),
        ({"TLS_CA": "/ca.pem"}, "redis.tls_ca = "),
        ({"URL": "rediss://host/0", "TLS_CERT": "/me.pem"}, "a certificate and its key"),
        ({"PASSWORD_FILE": "/nowhere"}, "ONSTREAM_REDIS__PASSWORD_FILE=/nowhere: "),
        ({"TLS_CA_FILE": "/x"}, "unknown setting"),
    ],
)
def test_what_does_not_fit_is_told_without_the_secret(
    variables: dict[str, str], words: str
) -> None:
    environ = URL | {f"ONSTREAM_REDIS__{name}": value for name, value in variables.items()}
    (problem,) = resolve(environ=environ).problems
    assert words in str(problem)
    assert "two" not in str(problem) and ":one" not in str(problem)


def test_a_secret_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("two")
    with pytest.raises(
        Exception, match="both ONSTREAM_REDIS__PASSWORD and ONSTREAM_REDIS__PASSWORD_FILE"
    ):
        loaded(PASSWORD="one", PASSWORD_FILE=str(file))


def test_a_key_of_an_endpoint_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-1")
    prefix = "ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__"
    settings = load_settings(
        environ={
            f"{prefix}CLIENT__API_KEY_FILE": str(file),
            f"{prefix}CLIENT__BASE_URL": "http://a/v1",
            f"{prefix}MODEL__NAME": "t",
        }
    )
    teacher = settings.orchestrator.teacher_model
    assert teacher is not None and teacher.client.api_key is not None
    assert teacher.client.api_key.get_secret_value() == "sk-1"
