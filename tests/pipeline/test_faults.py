"""A fault at every call of the worker loop: killed, put to sleep past its lease, or cut off, before
the call, between its work and its reply, and after. Each time every number issued arrives once."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Literal

import pytest

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import GROUP
from tests.fault_proxy import MOMENTS, Cut, FaultProxy, Moment, Trap
from tests.fault_workers import work
from tests.forkserver import context
from tests.pipeline.stages import ticket
from tests.waiting import LONGEST_S, until

pytestmark = pytest.mark.slow

NUMBERS = list(range(1, 13))
VICTIM = "victim"
OTHER = "other"
DEAD = "dead"
LIVES = 10
BEAT_S = 0.5  # the heartbeat of one that was put to sleep is older
Blow = Literal["kill", "stall", "cut"]


@dataclass(frozen=True)
class Point:
    """A call of the loop, and how to make a worker come to it.

    `keeps`: it finishes nothing, so that it is struck with records in hand. `pending`: who has all
    records in hand when it starts. `told_to_stop`: the call belongs to its end.
    """

    call: str
    keeps: bool = False
    pending: str = ""
    told_to_stop: bool = False


POINTS = {
    "telling-that-it-is-ready": Point("MARK_READY"),
    "looking-for-what-it-had-before": Point("XPENDING", pending=VICTIM),
    "taking-up-what-it-had-before": Point("XCLAIM", pending=VICTIM),
    "looking-for-what-nobody-renews": Point("XPENDING idle", pending=DEAD),
    "claiming-what-nobody-renews": Point("XCLAIM", pending=DEAD),
    "forgetting-dead-workers": Point("FORGET_DEAD_CONSUMERS", keeps=True),
    "reading": Point("XREADGROUP"),
    "renewing": Point("RENEW", keeps=True),
    "heartbeat": Point("HEARTBEAT", keeps=True),
    "asking-whether-the-run-has-ended": Point("GET finished", keeps=True),
    "moving-on": Point("HOP"),
    "ending-its-read": Point("CLIENT UNBLOCK", keeps=True, told_to_stop=True),
    "giving-back": Point("GIVE_BACK", keeps=True, told_to_stop=True),
    "retiring": Point("RETIRE", keeps=True, told_to_stop=True),
}
BLOWS: dict[Blow, tuple[Moment, ...]] = {
    "kill": MOMENTS,
    "stall": (
        "before",
        "between",
    ),  # whether the reply waits in the proxy or in a sleeper's socket is all the same
    "cut": ("before", "between"),
}
CASES = [(point, blow, moment) for point in POINTS for blow in BLOWS for moment in BLOWS[blow]]


class Crew:
    """The processes of one case. The victim alone speaks through the proxy."""

    def __init__(self, bus: Bus, url: str) -> None:
        self.bus = bus
        self.url = url
        self.proxy = FaultProxy(url)
        self.processes: dict[str, BaseProcess] = {}
        self.wake = threading.Event()

    def start(self, name: str, *, keeps: bool = False, url: str | None = None) -> BaseProcess:
        """A worker of this name, in place of one that is dead."""
        self.processes[name] = process = context().Process(
            target=work, args=(name, url or self.url, self.bus.run, keeps)
        )
        process.start()
        return process

    def strike(self, blow: Blow) -> None:
        """What the proxy does to the victim. It goes on when it returns."""
        pid = self.processes[VICTIM].pid
        assert pid is not None
        if blow == "kill":
            os.kill(pid, signal.SIGKILL)
        if blow != "stall":
            raise Cut
        os.kill(pid, signal.SIGSTOP)
        assert self.wake.wait(LONGEST_S)
        os.kill(pid, signal.SIGCONT)

    def held(self, name: str) -> int:
        """Records that are pending with `name`."""
        return self.bus.state.pending_summary("generate").by_worker.get(name, 0)

    def stop(self, name: str) -> None:
        """SIGTERM to a worker that is at work, and a clean end."""
        process = self.processes[name]
        until(
            lambda: [
                1
                for beat in self.bus.state.workers(BEAT_S)
                if (beat.pid, beat.state) == (process.pid, "running")
            ]
        )
        process.terminate()
        self.end(name)

    def end(self, name: str) -> None:
        """A clean end."""
        self.processes[name].join(LONGEST_S)
        assert self.processes[name].exitcode == 0


@pytest.fixture
def crew(bus: Bus, redis_url: str) -> Iterator[Crew]:
    for script in vars(scripts).values():
        if isinstance(script, scripts.Script):
            bus.connection.client.script_load(
                script.source
            )  # or the first call of each would fail, and count as the one to strike at
    crew = Crew(bus, redis_url)
    yield crew
    crew.wake.set()
    for process in crew.processes.values():
        process.kill()
        process.join()
    crew.proxy.close()


def issue(bus: Bus, holder: str) -> None:
    """Issue all numbers; what a worker `holder` had read of them before it died is long idle."""
    assert bus.lease.issue(
        bus.lease.acquire(60),
        0,
        [ticket(number, route=("train",)) for number in NUMBERS],
        max_backlog=100,
    )
    if holder:
        stream = bus.keys.streams["generate"]
        entries = bus.streams.read("generate", len(NUMBERS))
        bus.connection.ask(
            "XCLAIM", stream, GROUP, holder, 0, *(entry.id for entry in entries), "IDLE", 600_000
        )


def assert_each_number_is_in_one_place(bus: Bus) -> None:
    """In the place before or in the one after. The later is read first: what moves meanwhile is
    then in both, and never in none.
    """
    arrived = Counter(bus.state.numbers("train"))
    assert set(arrived.values()) <= {1}, "duplicated"
    waiting = Counter(bus.state.numbers("generate"))
    assert set(waiting.values()) <= {1}, "duplicated"
    assert {*arrived, *waiting} | set(bus.state.numbers("train")) == set(NUMBERS), "lost"


def told_to_stop(crew: Crew, trap: Trap, victim: BaseProcess) -> BaseProcess:
    """SIGTERM to a victim that holds records; and to its next life, where a read that ended by
    itself had not to be ended.
    """
    for _ in range(LIVES):
        until(lambda: crew.held(VICTIM) > 0)
        victim.terminate()
        until(lambda victim=victim: trap.sprung.is_set() or not victim.is_alive())  # type: ignore[misc]
        if trap.sprung.is_set():
            return victim
        victim = crew.start(VICTIM, keeps=True, url=crew.proxy.url)
    return victim


@pytest.mark.parametrize(("name", "blow", "moment"), CASES)
def test_a_fault_at_any_call_loses_nothing_and_doubles_nothing(
    bus: Bus, crew: Crew, name: str, blow: Blow, moment: Moment
) -> None:
    point = POINTS[name]
    issue(bus, point.pending)
    holds = point.keeps and not point.told_to_stop
    crew.proxy.trap = trap = Trap(
        point.call,
        moment,
        lambda: crew.strike(blow),
        when=lambda: not holds or crew.held(VICTIM) > 0,
    )
    victim = crew.start(VICTIM, keeps=point.keeps, url=crew.proxy.url)
    if point.told_to_stop:
        victim = told_to_stop(crew, trap, victim)
    assert trap.sprung.wait(LONGEST_S), (
        f"no {point.call} came; those that did: {sorted(crew.proxy.calls)}"
    )
    assert_each_number_is_in_one_place(bus)
    if blow == "kill":
        victim.join(LONGEST_S)
        assert victim.exitcode == -signal.SIGKILL
    successor = VICTIM if blow == "kill" else OTHER
    crew.start(successor)
    if blow == "cut" and point.keeps and not point.told_to_stop:
        crew.stop(VICTIM)  # as nothing else makes it let go
    until(lambda: len(bus.state.numbers("train")) >= len(NUMBERS))
    if blow == "stall":
        # what it was about to do, it does now, when all has been done by another one
        crew.wake.set()
    if point.told_to_stop and blow != "kill":
        crew.end(VICTIM)
    elif blow == "stall" or (blow == "cut" and not point.keeps):
        crew.stop(VICTIM)
    crew.stop(successor)
    assert Counter(bus.state.numbers("train")) == Counter(NUMBERS)
    assert (
        bus.state.backlog()["generate"],
        bus.state.dead_count(),
        bus.state.pending_summary("generate").count,
    ) == (0, 0, 0)
