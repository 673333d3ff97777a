"""`onstream replay`: a recorded run trained again, by itself, and whether it comes to the same
weights.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline import telemetry
from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.json_lines import JsonLines
from onstream.pipeline.run_files.recording import Opened, RecordingError
from onstream.settings.fields import known
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.settings.toml import shown, toml_text
from onstream.workers.launcher.report import read_rows
from onstream.workers.replay.recorded_run import RecordedRun, ReplayStart, run_dir_of
from onstream.workers.replay.result import ReplayResult
from onstream.workers.replay.show import Progress, replay_rows, step_text

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep

ALSO = (
    "deployment.device",
    "deployment.threads",
    "checkpoint.keep_policies",
    "log.level",
    "log.format",
)
"""What a replay may be told beside the settings of the trainer."""
Say = Callable[[str], None]


def replay(
    run: Path,
    overrides: Sequence[str],
    *,
    from_step: int | None,
    stop_at: int | None,
    out: Path | None,
    worst: int,
    say: Say,
) -> Exit:
    """Replay the recording of `run` into `out`, from the newest checkpoint before the step
    `from_step`, up to the step `stop_at`.

    The text that it ends with names the `worst` samples of the last step. Returns FAILED where the
    weights of a step differ, and no changed setting explains it.

    Raises:
        UserError: there is no recording, `out` exists, a setting is one that a replay cannot
            change, or no step is left.
    """
    _refuse_other(overrides)
    source = RecordedRun(run_dir_of(run))
    out = _fresh(source.run_dir, out)
    try:
        beginning = source.beginning(from_step)
    except RecordingError as error:
        raise _damaged(error) from error
    return Replay(source, beginning, out, overrides, say).run(stop_at, worst)


class Replay:
    """One replay, from what it says at its start to its verdict."""

    def __init__(
        self,
        source: RecordedRun,
        beginning: ReplayStart,
        out: Path,
        overrides: Sequence[str],
        say: Say,
    ) -> None:
        self._source = source
        self._beginning = beginning
        self._out = out
        self._overrides = overrides
        self._say = say
        self.settings = self._under(beginning.opened)
        recorded = self._under(beginning.opened, changed=False)
        names = [override.partition("=")[0].strip() for override in overrides]
        values = {
            name: (known()[name].value(recorded), known()[name].value(self.settings))
            for name in names
            if name in known()
        }
        self._changed = {
            name: pair
            for name, pair in values.items()
            if pair[0] != pair[1] and not name.startswith(("log.", "checkpoint."))
        }

    def run(self, stop_at: int | None, worst: int) -> Exit:
        """Play and tell. Raises UserError where no step is left."""
        self._say_what_it_is()
        telemetry.configure("replay", "replay", self.settings.run.name, self.settings.log)
        threads = self.settings.deployment.threads or self._beginning.opened.conditions.get(
            "threads", 1
        )
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(
            threads
        )  # before the tensor library is imported
        from onstream.workers.replay.player import Player

        self._out.mkdir(parents=True)
        (self._out / "settings.toml").write_text(toml_text(self.settings), encoding="utf-8")
        verdict = ReplayResult(self._changed)
        last = None
        damage = None
        player = Player(
            self._beginning,
            self._under,
            self._say,
            partial(recording.images, self._source.directory),
        )
        progress = Progress(
            self._say, self._last_step(stop_at), self.settings.deployment.status_interval
        )
        with Files(self._out) as files:
            try:
                for last in player.play(self._source.frames(self._beginning), stop_at=stop_at):
                    verdict.add(last)
                    files.write(last, self._source.run_dir.name)
                    progress.show(last, verdict)
            except RecordingError as error:
                damage = error
        if last is not None:
            checkpoint = player.save()
            self._say(
                step_text(
                    last,
                    worst,
                    self._source.run_dir.name,
                    compared=bool(self._changed) or not verdict.equal,
                )
            )
            self._compare_checkpoint(verdict, last.step, checkpoint)
        return self._end(verdict, player.missed, damage)

    def _end(
        self, verdict: ReplayResult, missed: int | None, damage: RecordingError | None
    ) -> Exit:
        verdict.missed = missed
        for line in verdict.lines():
            self._say(line)
        if damage is not None:
            self._say(f"the replay ends there: {damage}")
        if not verdict.steps:
            raise UserError(
                f"no step was replayed from step {self._beginning.step} on",
                expected="a recorded step behind it",
                next_step="Give an earlier --from-step or a later --stop-at; a recording ends with the last step that its run took.",
                exit=Exit.FAILED,
            )
        self._say(f"metrics, samples, weights and a checkpoint are in {self._out}")
        return Exit.OK if verdict.passes and damage is None else Exit.FAILED

    def _under(self, opened: Opened, *, changed: bool = True) -> Settings:
        """The settings of a trainer that took the run up as `opened` says, with what this replay
        changes in them.
        """
        recorded = [f"{name}={json.dumps(value)}" for name, value in opened.settings.items()]
        own = [
            f"run.name={self._out.name}",
            f"run.dir={self._out.parent}",
            "trainer.record=false",
            "log.level=warning",
        ]
        # Nothing of the environment: it belongs to other runs.
        return load_settings(
            [self._source.settings_file],
            [*recorded, *own, *(self._overrides if changed else ())],
            environ={},
        )

    def _say_what_it_is(self) -> None:
        found = self._beginning.found
        at = f"step {self._beginning.step} ({found.path})" if found else "the start of the run"
        self._say(f"replays {self._source.run_dir} from {at}")
        for name, (theirs, ours) in self._changed.items():
            self._say(f"what if: {name} is {shown(ours)} instead of {shown(theirs)}")

    def _last_step(self, stop_at: int | None) -> int | None:
        rows = read_rows(self._source.run_dir / "metrics.jsonl")
        return stop_at if stop_at is not None else int(rows[-1]["step"]) if rows else None

    def _compare_checkpoint(self, verdict: ReplayResult, step: int, ours: Path) -> None:
        theirs = self._source.checkpoint_of(step)
        if theirs is not None and not self._changed:
            verdict.compare_checkpoints(ours, theirs)


class Files:
    """What a replay writes step by step: `metrics.jsonl`, `samples.jsonl` (every rollout) and
    `replay.jsonl` (equal or not).
    """

    def __init__(self, directory: Path) -> None:
        self._metrics, self._samples, self._steps = (
            JsonLines(directory / name)
            for name in ("metrics.jsonl", "samples.jsonl", "replay.jsonl")
        )

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._metrics, self._samples, self._steps):
            file.close()

    def write(self, played: ReplayedStep, run: str) -> None:
        """Write down a step; uids are those of `run`."""
        self._metrics.write({"time": time.time(), **played.row})
        for row in replay_rows(played, run):
            self._samples.write(row)
        line: dict[str, Any] = {
            "step": played.step,
            "digest": played.policy.digest,
            "same_weights": played.same_weights,
        }
        line |= {
            "recorded_digest": played.recorded.digest if played.recorded else None,
            "other_metrics": played.other_metrics,
        }
        self._steps.write(line)


def _refuse_other(overrides: Sequence[str]) -> None:
    """A replay has the trainer alone: what the others would do is in the recording."""
    for override in overrides:
        name = override.partition("=")[0].strip()
        if (
            name in known()
            and name not in ALSO
            and (not name.startswith("trainer.") or name == "trainer.record")
        ):
            raise UserError(
                f"--set {name}",
                expected=f"a setting of the trainer (trainer.…), or {', '.join(ALSO)}",
                next_step="Leave it out: rollouts, batches and staleness are as recorded.",
            )


def _fresh(run_dir: Path, out: Path | None) -> Path:
    """The directory of the replay: `out`, or the next free one beside the run's."""
    name = f"{run_dir.resolve().name}-replay"
    beside = (
        run_dir.resolve().with_name(f"{name}-{at}" if at > 1 else name) for at in range(1, 1 << 20)
    )
    chosen = out.resolve() if out else next(path for path in beside if not path.exists())
    if chosen.exists():
        raise UserError(
            f"{chosen} exists",
            expected="a directory to be made",
            next_step="Choose another --out, or remove it.",
        )
    return chosen


def _damaged(error: RecordingError) -> UserError:
    return UserError(
        str(error),
        expected="a whole recording up to the checkpoint to start from",
        next_step="Give an earlier --from-step, or none and --stop-at a step before the damage.",
        exit=Exit.FAILED,
    )
