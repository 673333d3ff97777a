"""The embedded Redis is started again when it dies, also while it starts, but not for ever."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.redis_binary import find_server
from onstream.workers.launcher.redis_keeper import RedisKeeper
from onstream.workers.launcher.supervisor import ChildFailed
from tests.redis_servers import kill


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that dies as it starts while there is a file `dies`."""
    program = tmp_path / "redis-server"
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" != --version ] && [ -e {tmp_path}/dies ]; then kill -9 $$; fi\n'
        f'exec {find_server(None)} "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    server = EmbeddedRedis(tmp_path / "data", max_memory_mb=64, server_bin=program)
    server.start()
    yield server
    server.stop()


def keep_until(keeper: RedisKeeper, holds: Callable[[], bool]) -> None:
    while not holds():
        keeper.keep(progress=3)


def test_a_server_that_is_killed_while_it_starts_is_started_again(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    said: list[str] = []
    keeper = RedisKeeper(server, 5, said.append)
    (tmp_path / "dies").touch()
    kill(server)
    keep_until(keeper, lambda: len(said) == 2)
    (tmp_path / "dies").unlink()
    keep_until(keeper, lambda: server.alive)
    assert said[0] == f"the embedded Redis died; starting it again on {server.data}"
    assert said[1].startswith("the embedded Redis did not come up: ")
    assert said[1].endswith(f"starting it again in 0.5 s on {server.data}")


def test_a_server_that_dies_too_often_ends_the_run_once_with_its_last_lines(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    said: list[str] = []
    keeper = RedisKeeper(server, 1, said.append)
    (tmp_path / "dies").touch()
    kill(server)
    with pytest.raises(ChildFailed, match="2 times in a row without progress of the run") as failed:
        keep_until(keeper, lambda: False)
    assert str(server.data / "server.log") in failed.value.log[-1]
    assert len(said) == 1
    keeper.keep(progress=3)  # while the workers are drained


def test_progress_of_the_run_forgives_earlier_deaths(server: EmbeddedRedis) -> None:
    keeper = RedisKeeper(server, 1, print)
    for step in range(3):
        kill(server)
        while not server.alive:
            keeper.keep(progress=step)
