"""The launcher's child processes: started, restarted when they die, and stopped.

It knows no stage by name.
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
from typing import BinaryIO

from onstream.pipeline.errors import Exit
from onstream.pipeline.processes import kill_group
from onstream.workers.launcher.log_tail import last_lines
from onstream.workers.launcher.process_usage import process_cpu_seconds

NOT_MENDABLE = (Exit.USAGE, Exit.REFUSED)
"""Exit codes of a process that would end in the same way again."""

LONGEST_PAUSE_S = 10.0


def always() -> bool:
    """True."""
    return True


def never() -> bool:
    """False."""
    return False


class ChildFailed(Exception):
    """A child will not be started again.

    `reason` says why, `log` holds the last lines that it wrote, and `exit` is the code to end with.
    `child` is which one; None for the embedded Redis.
    """

    def __init__(self, reason: str, log: list[str], exit: Exit, child: Child | None = None) -> None:
        self.child = child
        self.reason = reason
        self.log = log
        self.exit = exit
        super().__init__(reason)


@dataclass
class Child:
    """A program to keep running, `python -m module arguments…`, and its process now, if any.

    Its output is appended to `log`, and `environ` is put on top of what all children get. With
    `once` a clean exit means that its work is done, without it that it may be the run's end. It is
    started, and started again, only while `may_start()`; a death while not `mendable()` ends the
    run. The run can do without an `optional` one: what would end the run ends that child alone.

    Nobody misses a `dismissed` one: its process is told to stop, and is not started again.

    `deaths` are in a row, without progress of the run between them. `clean_exit_at` is set until it
    is known whether the run is over; `start_at` until it is started. `cpu_s` is of all its
    processes that have ended. Times are monotonic seconds.
    """

    name: str
    kind: str
    module: str
    arguments: Sequence[str]
    log: Path
    once: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)
    may_start: Callable[[], bool] = always
    mendable: Callable[[], bool] = always
    optional: bool = False
    dismissed: bool = False
    process: subprocess.Popen[bytes] | None = None
    started: bool = False
    deaths: int = 0
    restarts: int = 0
    progress_at_death: int = -1
    clean_exit_at: float | None = None
    start_at: float | None = None
    done: bool = False
    cpu_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None

    @property
    def pid(self) -> int | None:
        """The id of its process while that runs."""
        return self.process.pid if self.process else None


@dataclass
class Supervisor:
    """Keeps its children running.

    Call everything from one thread, which must outlive the children: the kernel ties them to it.
    `environ` is what they get; `say` is told of every death and restart in words. While `excused()`
    deaths are not counted: something that passes is their cause.
    """

    environ: Mapping[str, str]
    max_restarts: int
    say: Callable[[str], None]
    excused: Callable[[], bool] = never
    children: list[Child] = field(default_factory=list)

    def start(self, child: Child) -> Child:
        """Start `child` now, or as soon as it may start."""
        self.children.append(child)
        child.start_at = time.monotonic()
        self._spawn_if_due(child)
        return child

    def poll(self, *, progress: int, finished: Callable[[float], bool | None]) -> None:
        """Look at what has ended, and start again what has to run.

        `progress` is any number of the run that grows while it gets on. `finished(since)` says
        whether the run is over, as known at some time after `since` (monotonic seconds), and None
        while nobody knows: it decides what a clean exit means.

        Raises:
            ChildFailed: a child died for a reason that a restart does not mend, or too often.
        """
        for child in self.children:
            code = self._reap(child)
            if child.dismissed:
                child.done = not child.alive
            elif code:
                self._handle_death(child, f"{child.name} {describe_exit(code)}", progress, code)
            elif child.clean_exit_at is not None:
                over = True if child.once else finished(child.clean_exit_at)
                self._handle_clean_exit(child, over, progress)
            else:
                self._spawn_if_due(child)

    def dismiss(self, child: Child) -> None:
        """Ask `child` to stop, and do not start it again; it is done once it has stopped."""
        child.dismissed = True
        self._signal([child], signal.SIGTERM)

    def running(self, *kinds: str) -> list[Child]:
        """Children with a live process, of these kinds or of all."""
        alive = [child for child in self.children if child.alive]
        return [child for child in alive if child.kind in kinds] if kinds else alive

    def drain(
        self,
        children: Iterable[Child],
        *,
        within_s: float | None,
        hurry: Callable[[], bool],
        tick: Callable[[], None],
    ) -> None:
        """Ask `children` to stop, and wait for them.

        Those that outlast `within_s` are killed, and all of them once `hurry()` is true. `tick` is
        called while waiting.
        """
        waiting = [child for child in children if child.alive]
        self._signal(waiting, signal.SIGTERM)
        deadline = float("inf") if within_s is None else time.monotonic() + within_s
        while waiting := [child for child in waiting if self._still_runs(child)]:
            if hurry() or time.monotonic() > deadline:
                names = ", ".join(child.name for child in waiting)
                self.say(f"killed {names}, which had not stopped")
                self.kill(waiting)
                return
            tick()

    def kill(self, children: Iterable[Child] | None = None) -> None:
        """Kill `children`, or all of them, and wait until they are gone."""
        chosen = self.children if children is None else children
        victims = [child for child in chosen if child.alive]
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
        due = child.start_at is not None and time.monotonic() >= child.start_at
        if due and child.may_start():
            child.restarts += child.started
            child.start_at = None
            child.started = True
            try:
                self._spawn(child)
            except OSError as error:
                self._give_up(child, f"{child.name} cannot be started: {error}", Exit.FAILED)

    def _spawn(self, child: Child) -> None:
        command = [
            sys.executable,
            "-P",  # the user's directory must not hide our modules, or those of a library
            "-m",
            "onstream.workers.launcher.die_with_parent",
            str(os.getpid()),
            child.module,
            *child.arguments,
        ]
        with self._log_of(child) as log:
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

    def _log_of(self, child: Child) -> BinaryIO:
        """Where the lines of `child` go; nowhere while the disk has no room for another file."""
        try:
            child.log.parent.mkdir(parents=True, exist_ok=True)
            return child.log.open("ab")
        except OSError as error:
            self.say(f"the log of {child.name} is lost: {error}")
            return Path(os.devnull).open("ab")

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
        child.clean_exit_at = None if code else time.monotonic()
        child.cpu_s += usage.ru_utime + usage.ru_stime
        return code

    def _still_runs(self, child: Child) -> bool:
        if self._reap(child) is not None:
            child.clean_exit_at = None  # it was told to stop: this says nothing about the run
        return child.alive

    def _handle_death(self, child: Child, why: str, progress: int, code: int | None) -> None:
        """Plan the restart of a child that died; `code` is None for an early clean exit."""
        if code in NOT_MENDABLE:
            self._give_up(child, why, Exit(code))
            return
        if code is not None and not child.mendable():
            self._give_up(child, why, Exit.FAILED)
            return
        if not self.excused():
            child.deaths = child.deaths + 1 if progress <= child.progress_at_death else 1
        child.progress_at_death = progress
        if child.deaths > self.max_restarts:
            if child.deaths > 1:
                why += f", {child.deaths} times in a row without progress of the run"
            self._give_up(child, why, Exit.FAILED)
            return
        pause_s = pause_before_restart_s(child.deaths)
        child.start_at = time.monotonic() + pause_s
        when = f" in {pause_s:g} s" if pause_s else ""
        self.say(f"{why}; restarting it{when} (its log: {child.log})")

    def _give_up(self, child: Child, why: str, exit: Exit) -> None:
        """Let the run go on without `child`.

        Raises:
            ChildFailed: it cannot.
        """
        if not child.optional:
            raise ChildFailed(why, _last_lines(child), exit, child)
        child.dismissed = True
        child.done = True
        self.say(f"{why}; the run goes on without it (its log: {child.log})")

    def _handle_clean_exit(self, child: Child, over: bool | None, progress: int) -> None:
        if over is None:
            return
        child.clean_exit_at = None
        child.done = over
        if not over:
            why = f"{child.name} stopped before the run had finished"
            self._handle_death(child, why, progress, None)

    def _signal(self, children: Iterable[Child], number: signal.Signals) -> None:
        for child in children:
            if child.process is not None:
                os.kill(child.process.pid, number)


def _last_lines(child: Child) -> list[str]:
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
