"""Programs that nobody has read, and what they may not do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onstream.pipeline.tasks.sandbox import REQUIRED, Sandbox, SandboxError
from onstream.settings.sections.orchestrator import SandboxSettings
from tests.waiting import LONGEST_S

LIMITS = SandboxSettings(
    wall=1.5, cpu=1, memory=96, processes=6, file_size=1, scratch=4, output=10_000
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sandbox is made of Linux's own parts"
)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    made = Sandbox(LIMITS)
    if lacking := [name for name in made.missing() if name in REQUIRED]:
        pytest.skip(f"this machine permits no sandbox: {lacking}")
    return made


def processes_of(user: int) -> list[str]:
    """The processes that run as `user`, dead ones that nobody has waited for aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.stat().st_uid == user and "\nState:\tZ" not in (path / "status").read_text():
                found.append(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def leaves_nothing(sandbox: Sandbox) -> bool:
    """Whether all that a program started is gone.

    The kernel may take a moment to bury what was killed.
    """
    deadline = time.monotonic() + LONGEST_S
    while processes_of(sandbox._user) and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.geteuid() != 0 or not processes_of(sandbox._user)


def test_a_program_reads_its_input_and_writes_its_output(sandbox: Sandbox) -> None:
    result = sandbox.run("print(input()[::-1])", b"maerts\n")
    assert (result.output, result.failure) == (b"stream\n", None)


def test_a_program_that_fails_says_so(sandbox: Sandbox) -> None:
    result = sandbox.run("raise SystemExit(3)", b"")
    assert (result.failure, result.message) == ("failed", "it ended with status 3")


def test_a_fork_bomb_is_killed_with_all_it_started(sandbox: Sandbox) -> None:
    bomb = (
        "import os\nwhile True:\n"
        "    try:\n        os.fork()\n        os.setsid()\n    except OSError:\n        pass\n"
    )
    result = sandbox.run(bomb, b"")
    assert result.failure in ("timed_out", "cpu_limit", "killed")
    assert leaves_nothing(sandbox)


def test_a_loop_that_ignores_every_signal_is_killed(sandbox: Sandbox) -> None:
    loop = (
        "import signal\n"
        "for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "while True:\n    pass\n"
    )
    assert sandbox.run(loop, b"").failure in ("timed_out", "cpu_limit", "killed")
    assert leaves_nothing(sandbox)


def test_ten_gigabytes_of_output_are_cut_at_the_limit(sandbox: Sandbox) -> None:
    result = sandbox.run(
        "import os\nchunk = b'x' * 65536\nfor _ in range(160_000):\n    os.write(1, chunk)\n", b""
    )
    assert result.failure == "output_limit"
    assert len(result.output) == LIMITS.output
    assert leaves_nothing(sandbox)


def test_the_environment_of_the_parent_cannot_be_read(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONSTREAM_SECRET", "hunter2-in-this-process")
    assert (
        sandbox.run(f"print(open('/proc/{os.getpid()}/environ', 'rb').read())", b"").failure
        == "failed"
    )
    everywhere = (
        "import glob, os\nprint(dict(os.environ))\n"
        "for path in ['/proc/%d/environ' % os.getppid(), *glob.glob('/proc/[0-9]*/environ')]:\n"
        "    try:\n        print(open(path, 'rb').read())\n    except OSError:\n        pass\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        env={"ONSTREAM_SECRET": "hunter2-in-another"},
    )
    result = sandbox.run(everywhere, b"")
    holder.communicate(b"\n")
    assert result.failure is None
    assert b"PATH" in result.output
    assert b"hunter2" not in result.output


def test_it_cannot_signal_the_process_that_runs_it(sandbox: Sandbox) -> None:
    result = sandbox.run(
        f"import os, signal\nfor pid in (os.getppid(), {os.getpid()}, -1):\n"
        "    os.kill(pid, signal.SIGTERM)\n",
        b"",
    )
    assert result.failure == "failed"


def test_it_has_no_network(sandbox: Sandbox) -> None:
    if "network" in sandbox.missing():
        pytest.skip("network namespaces are not permitted here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = sandbox.run(
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", b""
        )
    assert result.failure == "failed"


def test_it_sees_no_files_of_the_machine_and_writes_only_to_its_own_place(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    if "files" in sandbox.missing():
        pytest.skip("mount namespaces are not permitted here")
    (tmp_path / "secret").write_text("hunter2")
    assert sandbox.run(f"print(open({str(tmp_path / 'secret')!r}).read())", b"").failure == "failed"
    assert sandbox.run("open('/usr/mine', 'w')", b"").failure == "failed"
    assert (
        sandbox.run("open('mine', 'w').write('a')\nprint(open('mine').read())", b"").output
        == b"a\n"
    )


@pytest.mark.parametrize(
    "program",
    [
        "bytearray(200 << 20)",
        "open('big', 'wb').write(bytes(2 << 20))",
        "[open(str(n), 'wb').write(bytes(900_000)) for n in range(9)]",
        "[open('/dev/null') for _ in range(100)]",
    ],
    ids=["memory", "one file", "many files", "open files"],
)
def test_limits_bind(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run(program, b"").failure in ("failed", "killed")


OVER_MEMORY = {
    "memory of memfds": "import os\nfor _ in range(40):\n"
    "    os.write(os.memfd_create('x'), bytes(900_000 * 4))\nprint('held')",
    "shared memory of System V": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "libc.shmat.restype = ctypes.c_void_p\nfor _ in range(20):\n"
    "    key = libc.shmget(0, 8 << 20, 0o1600)\n    assert key >= 0\n"
    "    place = libc.shmat(key, 0, 0)\n    ctypes.memset(place, 1, 8 << 20)\n"
    "    libc.shmdt(ctypes.c_void_p(place))\nprint('held')",
    "children": "import os, time\nfor _ in range(4):\n    if not os.fork():\n"
    "        held = bytearray(b'x' * (40 << 20))\n        time.sleep(9)\ntime.sleep(9)",
    "shared mappings of children": "import mmap, os, time\nfor _ in range(4):\n"
    "    if not os.fork():\n        held = mmap.mmap(-1, 40 << 20)\n"
    "        held.write(b'x' * (40 << 20))\n        time.sleep(9)\ntime.sleep(9)",
    "a file system of its own": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "assert libc.unshare(0x10020000) == 0",
}


@pytest.mark.parametrize("program", OVER_MEMORY.values(), ids=OVER_MEMORY)
def test_all_its_memory_together_is_bounded(sandbox: Sandbox, program: str) -> None:
    if {"calls", "memory"} & set(sandbox.missing()):
        pytest.skip("this machine permits no such bound")
    assert sandbox.run(program, b"").failure in ("failed", "memory_limit")
    assert leaves_nothing(sandbox)


def test_children_that_share_their_memory_stay_within_the_bound(sandbox: Sandbox) -> None:
    shared = (
        "import os, time\nheld = bytearray(b'x' * (40 << 20))\nfor _ in range(4):\n"
        "    if not os.fork():\n        time.sleep(0.2)\n        os._exit(0)\n"
        "for _ in range(4): os.wait()\nprint('done')"
    )
    result = sandbox.run(shared, b"")
    assert (result.output, result.failure) == (b"done\n", None)


def test_it_runs_as_nobody_in_particular_without_a_way_up(sandbox: Sandbox) -> None:
    [user, privileges] = sandbox.run(
        "import os\nprint(os.getuid())\nprint(open('/proc/self/status').read())", b""
    ).output.split(b"\n", 1)
    assert int(user) != 0
    assert b"CapEff:\t0000000000000000" in privileges
    assert b"NoNewPrivs:\t1" in privileges


def test_a_background_process_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    daemon = (
        "import os, time\nif not os.fork():\n"
        "    os.setsid()\n    os.fork()\n    time.sleep(60)\nprint('left')\n"
    )
    result = sandbox.run(daemon, b"")
    assert (result.output, result.failure) == (b"left\n", None)
    assert leaves_nothing(sandbox)


def test_nothing_is_left_on_the_disk(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox.run("open('mine', 'w').write('a')", b"")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_started_is_the_sandbox_s_own_failure(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "files" in sandbox.missing() or os.path.realpath(sys.executable).startswith("/usr"):
        pytest.skip("this Python is found without its prefix")
    monkeypatch.setattr("sys.base_prefix", "/nowhere")
    with pytest.raises(SandboxError):
        sandbox.run("print(1)", b"")
