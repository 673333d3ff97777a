"""`onstream replay`: trains a recorded run again, and says whether it comes to the same weights."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline import telemetry
from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.json_lines import JsonLines, read_rows
from onstream.pipeline.run_files.recording import RecordingError
from onstream.settings.toml import shown, toml_text
from onstream.workers.replay.output import ReplayOutput
from onstream.workers.replay.recorded_run import RecordedRun, ReplayStart, run_dir_of
from onstream.workers.replay.result import (
    ReplayProgress,
    ReplayResult,
    replay_rows,
    worst_rows,
)
from onstream.workers.replay.what_if import WhatIf

if TYPE_CHECKING:
    from onstream.workers.replay.player import Player, ReplayedStep


def replay(
    run: Path,
    overrides: Sequence[str],
    *,
    from_step: int | None,
    stop_at: int | None,
    out: Path | None,
    worst: int,
    output: ReplayOutput,
) -> Exit:
    """Replay the recording of `run` into `out`.

    It starts from the newest checkpoint before the step `from_step`, and ends with the step
    `stop_at`. The text at its end names the `worst` samples of the last step. Returns FAILED where
    the weights or metrics of a step differ and no changed setting explains it.

    Raises:
        UserError: there is no recording, `out` exists, a setting is one that a replay cannot
            change, or no step is left.
    """
    recorded_run = RecordedRun(run_dir_of(run))
    out = _fresh(recorded_run.run_dir, out)
    what_if = WhatIf(recorded_run.settings_file, out, overrides)
    try:
        start = recorded_run.start(from_step)
    except RecordingError as error:
        raise _damaged(error) from error
    return Replay(recorded_run, start, out, what_if, output).run(stop_at, worst)


class Replay:
    """One replay, from what it says at its start to its result."""

    def __init__(
        self,
        recorded_run: RecordedRun,
        start: ReplayStart,
        out: Path,
        what_if: WhatIf,
        output: ReplayOutput,
    ) -> None:
        self._recorded_run = recorded_run
        self._start = start
        self._out = out
        self._what_if = what_if
        self._output = output
        self._say = output.say
        self._run_name = recorded_run.run_dir.name
        self._settings = what_if.settings_at(start.opened)
        self._changed = what_if.changed(start.opened)
        self._result = ReplayResult(self._changed)

    def run(self, stop_at: int | None, worst: int) -> Exit:
        """Replay, and say what it came to.

        Raises:
            UserError: no step is left.
        """
        self._say_what_it_is()
        telemetry.configure("replay", "replay", self._settings.run.name, self._settings.log)
        player = self._player()
        last, damage = self._play(player, stop_at)
        if last is not None:
            checkpoint = player.save()
            compared = bool(self._changed) or not self._result.equal
            self._output.step(last, worst, self._run_name, compared=compared)
            self._compare_checkpoint(last.number, checkpoint)
        code = self._end(player.missed, damage)
        if last is not None:
            self._output.result(self._data(last, worst, damage))
        return code

    def _data(
        self, last: ReplayedStep, worst: int, damage: RecordingError | None
    ) -> dict[str, Any]:
        """The result as JSON data, with the metrics and samples of the last step."""
        return {
            "run": str(self._recorded_run.run_dir),
            "out": str(self._out),
            **self._result.data(),
            "damage": str(damage) if damage else None,
            "metrics": last.row,
            "samples": worst_rows(last, worst, self._run_name),
        }

    def _player(self) -> Player:
        """The player, in a directory of its own."""
        threads = self._settings.deployment.threads
        threads = threads or self._start.opened.conditions.get("threads", 1)
        # Before the tensor library is imported: it reads them once.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["MKL_NUM_THREADS"] = str(threads)
        from onstream.workers.replay.player import Player

        self._out.mkdir(parents=True)
        (self._out / "settings.toml").write_text(toml_text(self._settings), encoding="utf-8")
        images = partial(recording.images, self._recorded_run.directory)
        return Player(self._start, self._what_if.settings_at, self._say, images)

    def _play(
        self, player: Player, stop_at: int | None
    ) -> tuple[ReplayedStep | None, RecordingError | None]:
        """Take all steps; returns the last one, and the damage that ended the replay, if any."""
        last = None
        interval_s = self._settings.deployment.status_interval
        progress = ReplayProgress(self._say, self._last_step(stop_at), interval_s)
        frames = self._recorded_run.frames(self._start)
        with ReplayFiles(self._out) as files:
            try:
                for last in player.play(frames, stop_at=stop_at):
                    self._result.add(last)
                    files.write(last, self._run_name)
                    progress.show(last, self._result)
            except RecordingError as error:
                return last, error
        return last, None

    def _end(self, missed: int | None, damage: RecordingError | None) -> Exit:
        self._result.missed = missed
        for line in self._result.lines():
            self._say(line)
        if damage is not None:
            self._say(f"the replay ends there: {damage}")
        if not self._result.steps:
            raise UserError(
                f"no step was replayed from step {self._start.step} on",
                expected="a recorded step behind it",
                next_step="Give an earlier --from-step or a later --stop-at; "
                "a recording ends with the last step that its run took.",
                exit=Exit.FAILED,
            )
        self._say(f"metrics, samples, weights and a checkpoint are in {self._out}")
        return Exit.OK if self._result.passes and damage is None else Exit.FAILED

    def _say_what_it_is(self) -> None:
        found = self._start.found
        place = f"step {self._start.step} ({found.path})" if found else "the start of the run"
        self._say(f"replays {self._recorded_run.run_dir} from {place}")
        for name, (theirs, ours) in self._changed.items():
            self._say(f"what if: {name} is {shown(ours)} instead of {shown(theirs)}")

    def _last_step(self, stop_at: int | None) -> int | None:
        if stop_at is not None:
            return stop_at
        rows = read_rows(self._recorded_run.run_dir / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else None

    def _compare_checkpoint(self, step: int, ours: Path) -> None:
        theirs = self._recorded_run.checkpoint_of(step)
        if theirs is not None and not self._changed:
            self._result.compare_checkpoints(ours, theirs)


class ReplayFiles:
    """What a replay writes step by step.

    `metrics.jsonl`, `samples.jsonl` with every rollout, and `replay.jsonl`: what equals the
    recorded step and what does not.
    """

    def __init__(self, directory: Path) -> None:
        self._metrics = JsonLines(directory / "metrics.jsonl")
        self._samples = JsonLines(directory / "samples.jsonl")
        self._steps = JsonLines(directory / "replay.jsonl")

    def __enter__(self) -> ReplayFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._metrics, self._samples, self._steps):
            file.close()

    def write(self, step: ReplayedStep, run: str) -> None:
        """Write a step; its rollouts are named as those of `run`."""
        self._metrics.write({"time": time.time(), **step.row})
        for row in replay_rows(step, run):
            self._samples.write(row)
        self._steps.write(
            {
                "step": step.number,
                "digest": step.policy.digest,
                "same_weights": step.same_weights,
                "recorded_digest": step.recorded.digest if step.recorded else None,
                "other_metrics": step.other_metrics,
            }
        )


def _fresh(run_dir: Path, out: Path | None) -> Path:
    """The directory of the replay: `out`, or the next free one beside the run's."""
    directory = out.resolve() if out else _next_free(run_dir.resolve())
    if directory.exists():
        raise UserError(
            f"{directory} exists",
            expected="a directory to be made",
            next_step="Choose another --out, or remove it.",
        )
    return directory


def _next_free(run_dir: Path) -> Path:
    directory = run_dir.with_name(f"{run_dir.name}-replay")
    at = 1
    while directory.exists():
        at += 1
        directory = run_dir.with_name(f"{run_dir.name}-replay-{at}")
    return directory


def _damaged(error: RecordingError) -> UserError:
    return UserError(
        str(error),
        expected="a whole recording up to the checkpoint to start from",
        next_step="Give an earlier --from-step, or none and --stop-at a step before the damage.",
        exit=Exit.FAILED,
    )
