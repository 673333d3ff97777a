"""The launcher's child processes: started, counted, restarted when they die, stopped in order. It
knows no stage by name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onstream.pipeline.errors import Exit
from onstream.pipeline.processes import kill_group
from onstream.workers.launcher.log_tail import last_lines

HOPELESS = (Exit.USAGE, Exit.REFUSED)
LONGEST_PAUSE_S = 10.0


def always() -> bool:
    """True."""
    return True


class GaveUp(Exception):
    """A child will not be started again. `reason` says why, `log` are the last lines it wrote and
    where, `exit` the code to end with.
    """

    def __init__(self, reason: str, log: list[str], exit: Exit) -> None:
        self.reason = reason
        self.log = log
        self.exit = exit
        super().__init__(reason)


@dataclass
class Child:
    """One place in the plan and the process that fills it now, if any.

    `once`: a clean exit means that its work is done, and not the run's. `deaths` are in a row,
    without progress of the run between them. `cpu_s` is of all its processes that have ended.
    """

    name: str
    kind: str
    module: str
    arguments: Sequence[str]
    log: Path
    once: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    may_start: Callable[[], bool] = always  # while it says no, the place stays empty
    mendable: Callable[[], bool] = always  # whether a restart may mend a death
    started: bool = False
    deaths: int = 0
    restarts: int = 0
    progress_at_death: int = -1
    clean_exit: float | None = None  # when, in monotonic seconds; set while it waits for judgement
    restart_at: float | None = None
    done: bool = False
    cpu_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether a process runs in this place."""
        return self.process is not None

    @property
    def pid(self) -> int | None:
        """The running process."""
        return self.process.pid if self.process else None


@dataclass
class Supervisor:
    """Keeps its children running. Call everything from one thread, which must outlive them: the
    kernel ties them to it.

    `environ` is what the children get; `say` is told of every death and restart in words.
    """

    environ: Mapping[str, str]
    max_restarts: int
    say: Callable[[str], None]
    children: list[Child] = field(default_factory=list)

    def start(
        self,
        name: str,
        kind: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        *,
        once: bool = False,
        environ: Mapping[str, str] | None = None,
        may_start: Callable[[], bool] = always,
        mendable: Callable[[], bool] = always,
    ) -> Child:
        """Start `python -m module arguments…`, its output appended to `log`, with `environ` on top
        of what all children get.

        It is started, and started again, only while `may_start()`: until then `poll` waits. A death
        while not `mendable()` ends the run.
        """
        child = Child(
            name,
            kind,
            module,
            arguments,
            log,
            once,
            environ or {},
            may_start=may_start,
            mendable=mendable,
        )
        self.children.append(child)
        child.restart_at = time.monotonic()
        self._spawn_if_due(child)
        return child

    def poll(self, *, progress: int, finished: Callable[[float], bool | None]) -> None:
        """Reap what has ended, judge it, and start again what shall run.

        `progress` is any number of the run that grows while it gets on. `finished(since)` says
        whether the run is over, as known at some time after `since` (monotonic seconds); None while
        nobody knows: a clean exit is judged by it.

        Raises:
            GaveUp: a child died for a reason that a restart does not mend, or once too often.
        """
        for child in self.children:
            code = self._reap(child)
            if code:
                hopeless = (
                    Exit(code) if code in HOPELESS else None if child.mendable() else Exit.FAILED
                )
                self._judge_death(child, f"{child.name} {describe_exit(code)}", progress, hopeless)
            elif child.clean_exit is not None:
                self._judge_clean_exit(
                    child, True if child.once else finished(child.clean_exit), progress
                )
            else:
                self._spawn_if_due(child)

    def running(self, *kinds: str) -> list[Child]:
        """Children with a live process, of these kinds or of all."""
        return [
            child for child in self.children if child.alive and (not kinds or child.kind in kinds)
        ]

    def drain(
        self,
        children: Iterable[Child],
        *,
        within_s: float | None,
        hurry: Callable[[], bool],
        tick: Callable[[], None],
    ) -> None:
        """Ask `children` to stop and wait for them; kill those that outlast `within_s`, and all
        once `hurry()` is true.
        """
        waiting = [child for child in children if child.alive]
        self._signal(waiting, signal.SIGTERM)
        deadline = time.monotonic() + within_s if within_s is not None else float("inf")
        while waiting := [child for child in waiting if self._still_runs(child)]:
            if hurry() or time.monotonic() > deadline:
                self.say(
                    f"killed {', '.join(child.name for child in waiting)}, which had not stopped"
                )
                self.kill(waiting)
                return
            tick()

    def kill(self, children: Iterable[Child] | None = None) -> None:
        """Kill `children`, or all of them, and wait until they are gone."""
        victims = [
            child for child in (self.children if children is None else children) if child.alive
        ]
        self._signal(victims, signal.SIGKILL)
        for child in victims:
            while self._still_runs(child):
                time.sleep(0.01)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds that each kind of child has used so far."""
        used: dict[str, float] = {}
        for child in self.children:
            live = process_cpu_seconds(child.pid) if child.pid is not None else 0.0
            used[child.kind] = used.get(child.kind, 0.0) + child.cpu_s + live
        return used

    def _spawn_if_due(self, child: Child) -> None:
        if (
            child.restart_at is not None
            and time.monotonic() >= child.restart_at
            and child.may_start()
        ):
            child.restarts += child.started
            child.restart_at = None
            child.started = True
            self._spawn(child)

    def _spawn(self, child: Child) -> None:
        child.log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-P",  # nothing of the user's directory is imported in the place of ours, or of a library
            "-m",
            "onstream.workers.launcher.die_with_parent",
            str(os.getpid()),
            child.module,
            *child.arguments,
        ]
        with child.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then
            # stops the others in order.
            child.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environ, **child.environ},
                start_new_session=True,
            )

    def _reap(self, child: Child) -> int | None:
        """The exit code of a process that has ended just now (negative: the signal)."""
        if child.process is None:
            return None
        pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
        if not pid:
            return None
        kill_group(pid)  # what it left behind would keep its memory and its ports
        code = os.waitstatus_to_exitcode(status)
        child.process.returncode = code
        child.process = None
        child.clean_exit = None if code else time.monotonic()
        child.cpu_s += usage.ru_utime + usage.ru_stime
        return code

    def _still_runs(self, child: Child) -> bool:
        if self._reap(child) is not None:
            child.clean_exit = None  # it was told to stop; nothing to judge
        return child.alive

    def _judge_death(self, child: Child, why: str, progress: int, hopeless: Exit | None) -> None:
        if hopeless:
            raise GaveUp(why, _last_words(child), hopeless)
        child.deaths = child.deaths + 1 if progress <= child.progress_at_death else 1
        child.progress_at_death = progress
        if child.deaths > self.max_restarts:
            times = (
                f", {child.deaths} times in a row without progress of the run"
                if child.deaths > 1
                else ""
            )
            raise GaveUp(why + times, _last_words(child), Exit.FAILED)
        pause_s = pause_before_restart_s(child.deaths)
        child.restart_at = time.monotonic() + pause_s
        self.say(
            f"{why}; restarting it{f' in {pause_s:g} s' if pause_s else ''} (its log: {child.log})"
        )

    def _judge_clean_exit(self, child: Child, over: bool | None, progress: int) -> None:
        if over is None:
            return
        child.clean_exit = None
        child.done = over
        if not over:
            self._judge_death(
                child, f"{child.name} stopped before the run had finished", progress, None
            )

    def _signal(self, children: Iterable[Child], number: signal.Signals) -> None:
        for child in children:
            if child.process is not None:
                os.kill(child.process.pid, number)


def _last_words(child: Child) -> list[str]:
    return [*last_lines(child.log), f"(its log: {child.log})"]


def pause_before_restart_s(deaths: int) -> float:
    """None after the first death in a row, then 0.5, 1, 2, … seconds."""
    return 0.0 if deaths <= 1 else min(0.5 * 2.0 ** (deaths - 2), LONGEST_PAUSE_S)


def describe_exit(code: int) -> str:
    """What a process did, in words: `was killed by SIGKILL`, `exited with 4 (stuck)`."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    names = {member.value: member.name.lower() for member in Exit}
    return f"exited with {code} ({names.get(code, 'unknown')})"


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of a live process and of the children it has waited for; 0 where /proc does not
    tell.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
