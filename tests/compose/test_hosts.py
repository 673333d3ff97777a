"""Two machines, each a network namespace with one end of a cable: Redis and the trainer on one,
generator and verifier on the other.

They share no disk and no other network. Weights go through Redis, and everything that goes through
Redis goes through TLS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.conftest import MakeProject
from tests.compose.project import ran, wait_for

HERE = Path(__file__).parent
FIRST = "10.77.0.1"
SECOND = "10.77.0.2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip"),
        reason="laying a cable between namespaces takes root and iproute2",
    ),
]


@pytest.fixture(scope="module")
def machines(images: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Two containers that do nothing but hold a network namespace, joined by veth. They outlive the
    projects inside them.
    """
    run = [
        "docker",
        "run",
        "--detach",
        "--network",
        "none",
        "--entrypoint",
        "sleep",
        f"{images['IMAGE']}:slim",
        "infinity",
    ]
    ids = [ran(run).strip() for _ in range(2)]
    pids = [ran(["docker", "inspect", "--format", "{{.State.Pid}}", one]).strip() for one in ids]
    ends = [f"on{pid}" for pid in pids]
    ran(
        [
            "ip",
            "link",
            "add",
            ends[0],
            "netns",
            pids[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            pids[1],
        ]
    )
    for pid, end, address in zip(pids, ends, (FIRST, SECOND), strict=True):
        ran(
            [
                "nsenter",
                "--target",
                pid,
                "--net",
                "ip",
                "address",
                "add",
                f"{address}/24",
                "dev",
                end,
            ]
        )
        ran(["nsenter", "--target", pid, "--net", "ip", "link", "set", end, "up"])
    yield ids[0], ids[1]
    ran(["docker", "rm", "--force", *ids])


def certificates(directory: Path) -> Path:
    """A directory with the certificate of an authority, and one of Redis that it vouches for, by
    the first machine's address.
    """
    directory.mkdir()
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    authority = [
        "-addext",
        "keyUsage=critical,keyCertSign",
        "-keyout",
        "ca.key",
        "-out",
        "ca.crt",
        "-subj",
        "/CN=Test",
    ]
    ran([*openssl, *authority], cwd=directory)
    names = f"subjectAltName=IP:{FIRST},DNS:localhost,DNS:redis"
    signed = [
        "-addext",
        names,
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-keyout",
        "redis.key",
        "-out",
        "redis.crt",
        "-subj",
        "/CN=redis",
    ]
    ran([*openssl, *signed, "-addext", "basicConstraints=critical,CA:FALSE"], cwd=directory)
    for path in directory.iterdir():
        os.chown(path, 1000, 1000)
    return directory


def in_namespace(container: str, image: str, *command: str) -> str:
    done = subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            "--network",
            f"container:{container}",
            "--entrypoint",
            "timeout",
            image,
            "5",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_run_across_two_machines_with_weights_through_redis_over_tls(
    machines: tuple[str, str], project: MakeProject, images: dict[str, str], tmp_path: Path
) -> None:
    tls = certificates(tmp_path / "tls")
    password = tmp_path / "password"
    password.write_text("of both machines")
    common = {
        "TLS": str(tls),
        "REDIS_URL": f"rediss://{FIRST}:6380/0",
        "REDIS_PASSWORD_FILE": str(password),
        "ONSTREAM_WEIGHTS__TRANSPORT": "redis",
        "ONSTREAM_TRAINER__MAX_STEPS": "6",
        "ONSTREAM_ORCHESTRATOR__BATCH_SIZE": "32",
        "ONSTREAM_EVAL__SAMPLES": "8",
    }
    files = [Path("compose.tls.yaml"), HERE / "host.yaml"]
    first = project(*files, **common, HOST_CONTAINER=machines[0])
    second = project(*files, **common, HOST_CONTAINER=machines[1])

    with first.up("redis", "trainer", "teacher") as up:
        wait_for(lambda: "waiting: " in first.said(), f"the first machine; {first.said()[-2000:]}")
        assert up.poll() is None
        redis = images["REDIS_IMAGE"]
        assert "refused" in in_namespace(machines[1], redis, "redis-cli", "-h", FIRST, "ping")
        assert "PONG" not in in_namespace(
            machines[1], redis, "redis-cli", "-h", FIRST, "-p", "6380", "ping"
        )
        assert "NOAUTH" in in_namespace(
            machines[1],
            redis,
            "redis-cli",
            "-h",
            FIRST,
            "-p",
            "6380",
            "--tls",
            "--insecure",
            "ping",
        )
        second.compose("up", "--no-deps", "prepare")
        second.run_through("--no-deps", "generator", "verifier")
        wait_for(
            lambda: up.poll() is not None,
            f"the end of the first machine's `up`; {first.said()[-2000:]}",
        )
    assert first.services() == {"prepare", "redis", "trainer", "teacher"}
    assert second.services() == {"prepare", "generator", "verifier"}
    assert first.report()["steps"] == 6
    assert not second.run_dir.exists()
    rows = first.rows("metrics.jsonl")
    assert all(row["reward"] is not None for row in rows)
    assert max(row["staleness_max"] for row in rows) <= 2
