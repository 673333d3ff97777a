"""The pool of scorer processes, and the worst that scorers do to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import load_scorer
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import ScoringRequest, Verdict
from onstream.workers.verifier.scorer_pool import CRASHED, TIMED_OUT, ScorerPool
from onstream.workers.verifier.scorer_process import score_completion
from tests.waiting import LONGEST_S
from tests.workers.verifier.own_modules import (
    REWARD,
    SCORER,
    installed_environment,
    write_own_modules,
)

StartPool = Callable[..., ScorerPool]
HONEST: dict[str, Any] = {}
MISBEHAVING = "tests.workers.verifier.misbehaving:score"


def settings_of(
    scorer: str | None = MISBEHAVING, *, timeout: float = 0.5, processes: int = 1
) -> Settings:
    verification = {"timeout": timeout, "processes": processes}
    return Settings.model_validate(
        {"task": {"scorer": scorer}, "orchestrator": {"verification": verification}}
    )


@pytest.fixture
def start_pool() -> Iterator[StartPool]:
    """Makes pools that have started, and closes them."""
    pools: list[ScorerPool] = []

    def make(**options: Any) -> ScorerPool:
        pools.append(ScorerPool(settings_of(**options)))
        pools[-1].start()
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def verdicts(pool: ScorerPool, *infos: dict[str, Any]) -> list[Verdict]:
    """The verdicts on rollouts with these infos, in their order."""
    for key, info in enumerate(infos):
        pool.score(key, [], "a completion", info)
    got: dict[int, Verdict] = {}
    while pool.in_hand:
        got.update(pool.collect(LONGEST_S))
    return [got[key] for key in range(len(infos))]


def test_the_builtin_scorer_gives_the_exact_answer_one_and_anything_else_nothing(
    start_pool: StartPool,
) -> None:
    pool = start_pool(scorer=None)
    pool.score(1, [], "cba", {"answer": "cba"})
    pool.score(2, [], "cbx", {"answer": "cba"})
    assert dict(pool.collect(LONGEST_S)) == {
        1: Verdict(1.0, {"similarity": 1.0}),
        2: Verdict(0.0, {"similarity": 2 / 3}),
    }


@pytest.mark.parametrize("misdeed", ["loop_forever", "ignore_signals"])
def test_a_rollout_past_its_time_limit_scores_zero_and_the_others_go_on(
    start_pool: StartPool, misdeed: str
) -> None:
    assert verdicts(start_pool(), HONEST, {"do": misdeed}, HONEST) == [
        Verdict(1.0),
        TIMED_OUT,
        Verdict(1.0),
    ]


@pytest.mark.parametrize(
    "misdeed", ["leave", "segfault", "close_everything", "write_everywhere", "fork_and_leave"]
)
def test_a_rollout_that_takes_its_process_down_twice_scores_zero_and_the_others_go_on(
    start_pool: StartPool, misdeed: str
) -> None:
    assert verdicts(start_pool(timeout=2), HONEST, {"do": misdeed}, HONEST, HONEST) == [
        Verdict(1.0),
        CRASHED,
        Verdict(1.0),
        Verdict(1.0),
    ]


def test_a_rollout_whose_child_was_killed_by_somebody_else_is_scored_by_the_next_child(
    start_pool: StartPool, tmp_path: Path
) -> None:
    assert verdicts(
        start_pool(), {"do": "be_killed_once", "marker": str(tmp_path / "tried")}, HONEST
    ) == [Verdict(1.0), Verdict(1.0)]


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        ("raise_error", "KeyError: 'no such thing' (misbehaving.py:"),
        ("raise_unprintable", "Unprintable (misbehaving.py:"),
        ("exit_politely", "SystemExit: bye"),
        ("take_memory", "MemoryError"),
        ("return_nan", "the score is nan; expected a finite number"),
        ("return_none", "the score is None; expected a number"),
        ("return_text", "the score is '1.0'; expected a number"),
    ],
)
def test_a_failure_of_the_scorer_itself_leaves_the_reward_absent_with_the_reason(
    start_pool: StartPool, misdeed: str, reason: str
) -> None:
    verdict, honest = verdicts(start_pool(timeout=5), {"do": misdeed}, HONEST)
    assert (verdict.reward, verdict.parts, honest) == (None, {}, Verdict(1.0))
    assert verdict.unscored is not None and reason in verdict.unscored


def test_a_scorer_that_blames_the_rollout_gives_it_zero(start_pool: StartPool) -> None:
    assert verdicts(start_pool(), {"do": "blame_the_rollout"}) == [
        Verdict(0.0, {"rollout_error": 1.0})
    ]


def test_ten_megabytes_on_each_standard_stream_disturb_nobody(
    start_pool: StartPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verdicts(start_pool(timeout=5), {"do": "print_much"}, HONEST) == [
        Verdict(1.0),
        Verdict(1.0),
    ]
    assert capfd.readouterr() == ("", "")


def test_the_copy_of_a_child_that_forks_and_returns_gives_no_second_verdict(
    start_pool: StartPool,
) -> None:
    pool = start_pool(timeout=5)
    rewards = [
        verdict.reward
        for verdict in verdicts(
            pool, {"do": "fork_and_return"}, HONEST, {"do": "fork_and_return"}, HONEST
        )
    ]
    assert rewards == [1.0, 1.0, 1.0, 1.0]


def test_what_a_scorer_leaves_running_is_killed_after_its_verdict(start_pool: StartPool) -> None:
    left, honest = verdicts(start_pool(timeout=5), {"do": "fork_and_stay"}, HONEST)
    assert (left.reward, honest) == (1.0, Verdict(1.0))
    assert is_gone(int(left.parts["pid"]))


def test_a_killed_child_is_replaced_by_one_that_lives(start_pool: StartPool) -> None:
    pool = start_pool()
    first, _, second = verdicts(
        pool, {"do": "tell_pid"}, {"do": "loop_forever"}, {"do": "tell_pid"}
    )
    assert first.parts["pid"] != second.parts["pid"]
    assert first.parts["parent"] == second.parts["parent"]
    assert is_gone(int(first.parts["pid"]))


def test_with_two_processes_quick_rollouts_do_not_wait_for_a_slow_one(
    start_pool: StartPool,
) -> None:
    pool = start_pool(timeout=90, processes=2)
    pool.score(0, [], "", {"do": "nap", "seconds": 60})
    for key in range(1, 33):
        pool.score(key, [], "", HONEST)
    early: list[int] = []
    while len(early) < 32:
        early += [key for key, _ in pool.collect(0.05)]
    assert sorted(early) == list(range(1, 33))


def test_a_crowd_of_all_kinds_gets_each_its_own_verdict(start_pool: StartPool) -> None:
    expected = {
        "leave": CRASHED,
        "segfault": CRASHED,
        "ignore_signals": TIMED_OUT,
        "fork_and_return": Verdict(1.0, retires=True),
        "print_much": Verdict(1.0),
        "blame_the_rollout": Verdict(0.0, {"rollout_error": 1.0}),
    }
    crowd: list[dict[str, Any]] = [
        HONEST if number % 7 == 6 else {"do": list(expected)[number % 7]} for number in range(84)
    ]
    got = verdicts(start_pool(processes=3), *crowd)
    assert got == [expected.get(info.get("do", ""), Verdict(1.0)) for info in crowd]


def test_the_time_limit_is_each_rollouts_own_and_not_the_batches(start_pool: StartPool) -> None:
    pool = start_pool(timeout=2.5)
    assert all(
        verdict == Verdict(1.0) for verdict in verdicts(pool, *[HONEST] * 200)
    )  # batches are large by now
    assert verdicts(pool, *[{"do": "nap", "seconds": 0.4}] * 8) == [Verdict(1.0)] * 8


def test_an_answer_that_came_while_the_verifier_was_away_is_not_late(start_pool: StartPool) -> None:
    pool = start_pool(timeout=2)
    pool.score(0, [], "", {"do": "nap", "seconds": 0.2})
    while not any(process.requests for process in pool._slots.values()):
        assert pool.collect(0.01) == []
    time.sleep(2.1)  # what is waited for is the time limit itself
    assert pool.collect(LONGEST_S) == [(0, Verdict(1.0))]


def test_a_completion_larger_than_any_socket_buffer_is_scored(start_pool: StartPool) -> None:
    pool = start_pool(scorer=None, timeout=5)
    answer = "é" * 2**22
    pool.score(0, [], answer, {"answer": answer})
    assert pool.collect(LONGEST_S) == [(0, Verdict(1.0, {"similarity": 1.0}))]


def test_a_collection_ends_when_its_time_is_over(start_pool: StartPool) -> None:
    pool = start_pool(timeout=120)
    pool.score(0, [], "", {"do": "loop_forever"})
    assert pool.collect(0.1) == []
    assert pool.in_hand == 1


def test_quick_scorers_get_more_room_than_slow_ones(start_pool: StartPool) -> None:
    pool = start_pool(timeout=5)
    before = pool.room
    verdicts(pool, *[HONEST] * 200)
    assert pool.room > before
    verdicts(pool, *[{"do": "nap", "seconds": 0.2}] * 12)
    assert pool.room < before


def test_the_end_of_the_fork_server_is_an_error_and_not_a_silence(start_pool: StartPool) -> None:
    pool = start_pool(timeout=5)
    (told,) = verdicts(pool, {"do": "tell_pid"})
    pool.score(0, [], "", {"do": "loop_forever"})
    assert pool.collect(0.05) == []
    os.kill(int(told.parts["parent"]), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="has ended, with status -9"):
        pool.collect(LONGEST_S)
    assert is_gone(int(told.parts["pid"]))


def test_nothing_outlives_a_verifier_that_is_killed() -> None:
    script = (
        "from tests.workers.verifier.test_scorer_pool import *\n"
        "pool = ScorerPool(settings_of(timeout=60)); pool.start()\n"
        "told = verdicts(pool, {'do': 'tell_pid'})[0].parts\n"
        "pool.score(0, [], '', {'do': 'loop_forever'}); pool.collect(0.05)\n"
        "print(int(told['pid']), int(told['parent']), flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as verifier:
        assert verifier.stdout is not None
        pids = [int(pid) for pid in verifier.stdout.readline().split()]
        verifier.kill()
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("no_such_module:score", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.workers.verifier.misbehaving:nothing", "has no attribute 'nothing'"),
        ("tests.workers.verifier.misbehaving:MARKER", "has no attribute 'MARKER'"),
        ("tests.workers.verifier:__path__", "it is a list"),
    ],
)
def test_a_scorer_that_cannot_be_imported_is_refused_at_the_start(scorer: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ScorerPool(settings_of(scorer)).start()
    assert "expected an importable `module:function`" in str(caught.value)


def test_a_scorer_whose_import_ends_the_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="ended while importing"):
        ScorerPool(settings_of("leaves:score")).start()


def test_processes_that_never_become_ready_are_an_error_and_not_an_endless_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_pool: StartPool
) -> None:
    (tmp_path / "stillborn.py").write_text(
        "import os\nos.register_at_fork(after_in_child=lambda: os._exit(9))\n"
        "def score(completion, info):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = start_pool(scorer="stillborn:score")
    pool.score(0, [], "", HONEST)
    with pytest.raises(
        RuntimeError,
        match="5 scorer processes in a row ended as they started, the last with status 9",
    ):
        pool.collect(LONGEST_S)


def test_a_scorer_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_pool: StartPool
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completion, info):\n    return {'length': len(completion) / 10, 'bonus': 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert verdicts(start_pool(scorer="mine:score"), HONEST) == [
        Verdict(1.7, {"length": 1.2, "bonus": 0.5})
    ]


def test_what_lies_in_the_users_directory_takes_the_place_of_nothing(tmp_path: Path) -> None:
    write_own_modules(tmp_path)
    script = (
        "import sys\nfrom onstream.settings.root import Settings\n"
        "from onstream.workers.verifier.scorer_pool import ScorerPool\n"
        "pool = ScorerPool(Settings.model_validate({'task': {'scorer': sys.argv[1]}}))\n"
        "pool.start(); pool.score(0, [], 'text', {}); print(pool.collect(30)[0][1].reward)\n"
        "pool.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, SCORER],
        cwd=tmp_path,
        env=installed_environment(tmp_path.with_name("installed")),
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{REWARD}\n", "")


def test_a_rollout_costs_little_more_than_its_two_messages_and_its_score(
    start_pool: StartPool,
) -> None:
    """About as much in CPU time as the bare messages, of which the pool sends many at once."""
    pool = start_pool(scorer=None)
    began = time.process_time()
    for key in range(6000):
        pool.score(key, [], "cba", {"answer": "cba"})
        if pool.room == 0 or key == 5999:
            pool.collect(LONGEST_S)
    fork_server = psutil.Process(pool._fork_server.pid)
    child_s = sum(sum(process.cpu_times()[:2]) for process in fork_server.children())
    pool_s = time.process_time() - began + child_s
    assert pool_s < 4 * bare_messages_s(6000)


def bare_messages_s(count: int) -> float:
    """CPU time of `count` requests and verdicts, one by one over a pair of sockets."""
    encode = msgspec.msgpack.Encoder().encode
    requests = msgspec.msgpack.Decoder(list[ScoringRequest])
    verdict = msgspec.msgpack.Decoder(Verdict)
    scorer = load_scorer(settings_of(None))
    asking, scoring = socket.socketpair()
    with asking, scoring:
        began = time.process_time()
        for _ in range(count):
            asking.sendall(encode([ScoringRequest("cba", {"answer": "cba"})]))
            [request] = requests.decode(scoring.recv(1 << 16))
            scoring.sendall(encode(score_completion(scorer, request)))
            verdict.decode(asking.recv(1 << 16))
        return time.process_time() - began


def is_gone(pid: int) -> bool:
    """Whether the process ends within some seconds; a zombie that nobody reaps counts as ended."""
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(timeout=5)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
