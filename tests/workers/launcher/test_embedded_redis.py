"""The Redis that the launcher starts: found, kept, restarted on its data, gone with its parent."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import WritesRefused
from onstream.workers.launcher import embedded_redis
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.redis_binary import find_server
from tests.redis_servers import kill


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "data", max_memory_mb=64)
    server.start()
    yield server
    server.stop()


def client(server: EmbeddedRedis) -> Redis:
    return Redis.from_url(server.url)


def test_the_server_keeps_every_write_when_it_is_killed_and_comes_back_at_the_same_address(
    server: EmbeddedRedis,
) -> None:
    url = server.url
    with client(server) as redis:
        redis.set("kept", "yes")
    kill(server)

    assert server.start() == url
    with client(server) as redis:
        assert redis.get("kept") == b"yes"


def test_writes_that_redis_refuses_for_its_disk_are_an_outage_that_passes(
    tmp_path: Path,
) -> None:
    """Its directory is gone, which no snapshot survives, in place of a full disk."""
    server = EmbeddedRedis(tmp_path / "data", max_memory_mb=64)
    url = server.start()
    bus = Bus.connect(url, "demo", consumer="a", block_s=0.2, connect_timeout_s=0.2)
    shutil.rmtree(tmp_path / "data")
    with client(server) as redis:
        redis.config_set("save", "3600 1")
        redis.bgsave()
        while redis.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.01)
        with pytest.raises(WritesRefused, match="MISCONF"):
            bus.state.mark_ready("train")
        redis.config_set("stop-writes-on-bgsave-error", "no")
        bus.state.mark_ready("train")
    bus.close()
    kill(server)  # it would not end without a last snapshot
    server.stop()


def test_the_server_is_bounded_and_never_evicts(server: EmbeddedRedis) -> None:
    with client(server) as redis:
        memory = redis.info("memory")
    assert (memory["maxmemory"], memory["maxmemory_policy"]) == (64 << 20, "noeviction")


def test_two_servers_never_share_data(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "LOCK_TIMEOUT_S", 0.05)
    second = EmbeddedRedis(server.data, max_memory_mb=64)
    with pytest.raises(UserError, match="another Redis still runs on"):
        second.start()
    second.stop()


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from onstream.workers.launcher.embedded_redis import EmbeddedRedis\n"
        f"server = EmbeddedRedis(Path({str(tmp_path)!r}), max_memory_mb=64)\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[3]
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL

    successor = EmbeddedRedis(
        tmp_path, max_memory_mb=64
    )  # it waits for the lock, which the first server gives up when it is gone
    successor.start()
    assert successor.pid not in (None, int(ran.stdout))
    successor.stop()


def test_data_of_a_newer_server_is_refused(server: EmbeddedRedis) -> None:
    server.stop()
    (server.data / "version").write_text("99.1.0")
    with pytest.raises(UserError, match=r"was written by Redis 99\.1\.0"):
        server.start()


def test_a_configured_server_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"redis\.server_bin = .*/no-server"):
        find_server(tmp_path / "no-server")


def test_a_server_on_the_path_comes_before_the_bundled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = find_server(None)
    on_path = tmp_path / "valkey-server"
    on_path.symlink_to(bundled)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server(None) == on_path


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"*1\r\n$3\r\nBAD\r\n")
    broken = EmbeddedRedis(tmp_path, max_memory_mb=64)
    with pytest.raises(UserError, match=r"the embedded Redis did not come up: .*append only file"):
        broken.start()
    broken.stop()
