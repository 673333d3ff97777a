"""A fault at every call of the trainer: killed, put to sleep while a successor takes the run over,
or cut off, before the call, between its work and its reply, and after. Each time the run reaches
its end with every number accounted for once."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pytest

from onstream.pipeline.errors import Exit
from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.run_files import ownership
from onstream.pipeline.run_files.ledger import Ledger
from onstream.settings.root import Settings
from onstream.workers.inspection.audit import audit, counted
from onstream.workers.trainer.durability import checkpoint
from tests.fault_proxy import MOMENTS, Cut, FaultProxy, Moment, Trap
from tests.fault_workers import LEASE_S, train
from tests.forkserver import context
from tests.tiny import write_tiny
from tests.waiting import LONGEST_S
from tests.workers.trainer.driver import rollout

pytestmark = pytest.mark.slow

STEPS = 3
BATCH = 4
Blow = Literal["kill", "stall", "cut"]


@dataclass(frozen=True)
class Point:
    """A call of the trainer. `step`: not before so many versions are announced. `when` says more of
    the moment that is meant.

    `resumed`: the call of a trainer that takes up a run whose trainer was killed with entries in
    hand.
    """

    call: str
    step: int = 0
    resumed: bool = False
    when: Callable[[Path], bool] = lambda run_dir: True


def writes_a_checkpoint(run_dir: Path) -> bool:
    """Whether one lies there whole but for its name."""
    return any((run_dir / checkpoint.FOLDER).glob(f".writing-*/{checkpoint.MANIFEST}"))


POINTS = {
    "becoming-the-trainer": Point("ACQUIRE"),
    "writing-the-plan": Point("SET_KEY plan"),
    "announcing-the-first-version": Point("ANNOUNCE"),
    "telling-that-it-is-ready": Point("MARK_READY"),
    "issuing": Point("ISSUE"),
    "issuing-more": Point("ISSUE", step=1),
    "reading": Point("XREADGROUP"),
    "reading-more": Point("XREADGROUP", step=1),
    "announcing-another-version": Point("ANNOUNCE", step=1),
    "naming-a-checkpoint": Point("RENEW_LEASE", when=writes_a_checkpoint),
    "acknowledging": Point("ACKNOWLEDGE"),
    "heartbeat": Point("HEARTBEAT", step=1),
    "looking-for-what-its-predecessor-had": Point("XPENDING", resumed=True),
    "taking-up-what-its-predecessor-had": Point("XCLAIM", resumed=True),
    "ending-the-run": Point("SET_KEY finished"),
    "letting-go-of-the-lease": Point("RELEASE_LEASE"),
    "retiring": Point("RETIRE"),
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


class Company:
    """A run's trainers, one after the other, and the generator that this test is."""

    def __init__(self, bus: Bus, url: str, settings: Settings) -> None:
        self.bus = bus
        self.url = url
        self.settings = settings
        self.proxy = FaultProxy(url)
        self.trainers: list[BaseProcess] = []
        self.wake = threading.Event()
        bus.state.mark_ready("generate")

    def start(self, url: str | None = None) -> BaseProcess:
        """Another trainer."""
        name = f"trainer-{len(self.trainers)}"
        process = context().Process(
            target=train, args=(name, url or self.url, self.settings.model_dump_json())
        )
        process.start()
        self.trainers.append(process)
        return process

    def strike(self, victim: Callable[[], BaseProcess], blow: Blow) -> None:
        """What the proxy does to the victim. It goes on when it returns."""
        pid = victim().pid
        assert pid is not None
        if blow == "kill":
            os.kill(pid, signal.SIGKILL)
        if blow != "stall":
            raise Cut
        os.kill(pid, signal.SIGSTOP)
        assert self.wake.wait(LONGEST_S)
        os.kill(pid, signal.SIGCONT)

    def succeed(self, victim: BaseProcess) -> None:
        """Start the next trainer and see the run through. It waits for a sleeper in the middle of a
        write, which has to wake up first.
        """
        while victim.is_alive() and _state(victim) != "T":
            time.sleep(0.001)
        epoch = self._epoch
        sleeper_writes = victim.is_alive() and self._files_are_locked()
        successor = self.start()
        if sleeper_writes:
            self.until(lambda: self._epoch > epoch)
            self.wake.set()
        self.until(lambda: successor.exitcode is not None)
        assert successor.exitcode == Exit.OK

    @property
    def _epoch(self) -> int:
        return int(self.bus.connection.ask("GET", self.bus.keys.epoch) or 0)

    def _files_are_locked(self) -> bool:
        path = self.settings.run_dir / ownership.FILE
        if not path.exists():
            return False
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def until(self, holds: Callable[[], Any]) -> None:
        """Answer tickets until `holds()`."""
        deadline = time.monotonic() + LONGEST_S
        while not holds():
            self._answer()
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.01)

    def _answer(self) -> None:
        policy = self.bus.state.newest_policy()
        if policy is None:
            return
        entries = self.bus.streams.read("generate", 100)
        answers = [(entry, rollout(decode_work(entry.payload), policy.number)) for entry in entries]  # type: ignore[arg-type]
        self.bus.streams.move(
            "generate",
            [
                Move(entry.id, [Out("train", entry.number, encode(answer))])
                for entry, answer in answers
            ],
        )

    @property
    def version(self) -> int:
        """The newest version announced; -1 before the first."""
        policy = self.bus.state.newest_policy()
        return policy.number if policy else -1

    def assert_nothing_is_lost_or_doubled(self) -> dict[str, Any]:
        found = counted(audit(self.settings.run_dir, self.bus))
        assert (found["lost"], found["duplicated"]) == (0, 0), found
        return found


def _state(process: BaseProcess) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny student."""
    return write_tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture
def company(bus: Bus, redis_url: str, student: Path, tmp_path: Path) -> Iterator[Company]:
    for script in vars(scripts).values():
        if isinstance(script, scripts.Script):
            bus.connection.client.script_load(
                script.source
            )  # or the first call of each would fail, and count as the one to strike at
    settings = Settings.model_validate(
        {
            "run": {"name": bus.run, "dir": str(tmp_path)},
            "model": {"name": str(student)},
            "deployment": {"device": "cpu", "stages": ["generate", "train"]},
            "orchestrator": {"batch_size": BATCH, "group_size": 2, "max_off_policy_steps": 1},
            "trainer": {"max_steps": STEPS, "loss": {"adv_tau": 1.0}},
            "checkpoint": {"interval": 1},
            "delivery": {"lease": LEASE_S},
            "redis": {"url": redis_url},
            "eval": {"samples": 0},
        }
    )
    company = Company(bus, redis_url, settings)
    yield company
    company.wake.set()
    for process in company.trainers:
        process.kill()
        process.join()
    company.proxy.close()


def leave_a_run_behind(company: Company) -> None:
    """A trainer takes a step and is killed with entries in hand."""
    first = company.start()
    company.until(lambda: company.version >= 1 and _stopped_with_entries(company.bus, first))
    first.kill()
    first.join()


def _stopped_with_entries(bus: Bus, trainer: BaseProcess) -> bool:
    """Stop `trainer` where it has entries in hand; it acknowledges what has settled at any time."""
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGSTOP)
    while _state(trainer) != "T":
        time.sleep(0.001)
    if bus.state.pending_summary("train").count:
        return True
    os.kill(trainer.pid, signal.SIGCONT)
    return False


@pytest.mark.parametrize(("name", "blow", "moment"), CASES)
def test_a_fault_at_any_call_of_the_trainer_loses_nothing_and_doubles_nothing(
    bus: Bus, company: Company, name: str, blow: Blow, moment: Moment
) -> None:
    point = POINTS[name]
    run_dir = company.settings.run_dir
    if point.resumed:
        leave_a_run_behind(company)
    company.proxy.trap = trap = Trap(
        point.call,
        moment,
        lambda: company.strike(lambda: victim, blow),
        when=lambda: point.when(run_dir) and (not point.step or company.version >= point.step),
    )
    victim = company.start(company.proxy.url)
    company.until(lambda: trap.sprung.is_set() or not victim.is_alive())
    assert trap.sprung.is_set(), (
        f"no {point.call} came; those that did: {sorted(company.proxy.calls)}"
    )
    if run_dir.exists():
        company.assert_nothing_is_lost_or_doubled()
    if blow == "kill":
        victim.join(30)
        assert victim.exitcode == -signal.SIGKILL
    if blow != "cut":
        company.succeed(victim)
    company.wake.set()
    if blow != "kill":
        company.until(lambda: victim.exitcode is not None)
        # One that slept while another trained has lost its lease; unless it slept before it had
        # one, or when all was done.
        assert victim.exitcode in ((Exit.OK,) if blow == "cut" else (Exit.OK, Exit.REFUSED))
    assert bus.state.finished() and company.version == STEPS
    found = company.assert_nothing_is_lost_or_doubled()
    assert (found["trained"], found["dead"]) == (STEPS * BATCH, 0)
    assert len({line.number for line in Ledger(run_dir / "trained.jsonl").read()}) == found[
        "trained"
    ] + sum(found["dropped"].values())
    newest = checkpoint.load_newest(run_dir / checkpoint.FOLDER)
    assert newest is not None and newest.state.step == STEPS
