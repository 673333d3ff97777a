"""Feeds a recorded stream to the trainer's own training, with nobody else at work.

The same records in the same order make the same batches, steps and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from onstream.pipeline import weights
from onstream.pipeline.images.feature_cache import FetchImages, no_images
from onstream.pipeline.record_codec import decode_unchecked
from onstream.pipeline.records import PolicyVersion, Rollout, Tombstone
from onstream.pipeline.run_files.recording import Frame, RecordFrame, ResumeMark, StepMark
from onstream.pipeline.weights import DirectoryWriter, LoadedPolicy, PolicySender
from onstream.pipeline.weights.digest import is_of_adapter
from onstream.settings.root import Settings
from onstream.workers.replay.recorded_run import ReplayStart, settled_in
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpoint import TrainerState
from onstream.workers.trainer.durability.recording import conditions
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from onstream.workers.trainer.losses.row_loss import PerSampleLosses
from onstream.workers.trainer.publication.publisher import packer_of, student_files
from onstream.workers.trainer.training import Training, learner_at


@dataclass(frozen=True)
class ReplayedStep:
    """A step of the replay, and what the recording says of it.

    `recorded` is None for a step that the recorded run did not take there.
    """

    policy: PolicyVersion
    row: dict[str, Any]
    recorded: StepMark | None
    same_weights: bool
    """Whether the recorded run came to these weights, bit for bit, in this step."""
    batch: list[TrainableUnit]
    per_sample: PerSampleLosses

    @property
    def number(self) -> int:
        """The step's number."""
        return self.policy.number

    @property
    def other_metrics(self) -> list[str]:
        """Names of the metrics that differ from the recorded ones.

        Those that the version which recorded did not have are left out.
        """
        recorded = self.recorded.metrics if self.recorded else {}
        names = recorded or self.row
        return [name for name in names if recorded.get(name) != self.row.get(name)]


class Player:
    """Replays from `start` into `settings.run_dir`.

    `missed` is the first step that the recorded run took where none was due here.

    Args:
        settings_at: the settings under which a trainer went on, from what it recorded.
        say: hears of conditions that are not the recorded ones.
        images: gives the bytes of images by digest.

    Raises:
        UserError: the student cannot be loaded.
    """

    def __init__(
        self,
        start: ReplayStart,
        settings_at: Callable[[ResumeMark], Settings],
        say: Callable[[str], None],
        images: FetchImages = no_images,
    ) -> None:
        self._settings_at = settings_at
        self._say = say
        self.settings = settings_at(start.opened)
        self._set_conditions(start.opened)
        self.run_dir = self.settings.run_dir
        self.settled = settled_in(start.found)
        self.missed: int | None = None
        learner = learner_at(self.settings, start.found)
        self.training = Training(
            self.settings,
            learner,
            worker="replay",
            step=start.step,
            dropped=start.found.state.dropped if start.found else None,
            images=images,
        )
        store = DirectoryWriter(self.run_dir, student_files(self.run_dir, learner))
        self._sender = PolicySender(store, full_every=None)
        self._packer = packer_of(learner, self.settings)
        loaded = self._publish()
        if not start.position and not self._is_version(start.opened.digest, loaded):
            say(
                "the weights that the recorded run started from "
                "are not those that this replay starts from"
            )
        for record in start.held:
            self._take(record)

    def play(self, frames: Iterable[Frame], *, stop_at: int | None) -> Iterator[ReplayedStep]:
        """Take the steps that `frames` hold, up to `stop_at`."""
        for frame in frames:
            if stop_at is not None and self.training.step >= stop_at:
                return
            if isinstance(frame, RecordFrame):
                self._take(frame)
                continue
            self._advance()
            if isinstance(frame, ResumeMark):
                self._resume(frame)
            else:
                yield from self._steps(frame)

    def save(self) -> Path:
        """Write a checkpoint of where the replay stands; returns its directory."""
        state = TrainerState(
            sequence=1,
            step=self.training.step,
            policy=self.policy,
            issued=max((last for _, last in self.settled.numbers().ranges()), default=0),
            settled=self.settled.ranges(),
            before=[],
            ledger_bytes=0,
            totals={},
            dropped=dict(self.training.dropped),
        )
        directory = self.run_dir / checkpoint.FOLDER
        snapshot = LearnerSnapshot(self.training.learner)
        return checkpoint.save(directory, state, snapshot.write, fence=nullcontext).path

    def _take(self, recorded: RecordFrame) -> None:
        record = decode_unchecked(recorded.payload)
        # With another batch size it may have settled before.
        if isinstance(record, Rollout | Tombstone) and recorded.number not in self.settled:
            self.training.take(record, recorded.taken)

    def _advance(self) -> None:
        """Consider what was recorded up to here: the recorded trainer had considered all of it."""
        self.settled.add(self.training.advance().settled)

    def _resume(self, opened: ResumeMark) -> None:
        """Go on as the trainer that resumed the run there: it knew only what had settled."""
        self.training.forget()
        self.settings = self._settings_at(opened)
        self.training.learner.take_settings(self.settings.trainer)
        self.training.max_steps = self.settings.trainer.max_steps
        self._set_conditions(opened)

    def _set_conditions(self, opened: ResumeMark) -> None:
        """Compute with as many threads as recorded, and say what else is not as recorded."""
        threads = self.settings.deployment.threads or opened.conditions.get("threads")
        torch.set_num_threads(threads or torch.get_num_threads())
        here = conditions(self.settings)
        for name, recorded in opened.conditions.items():
            if here.get(name) != recorded:
                self._say(
                    f"{name} was {recorded} when step {opened.step + 1} was recorded, "
                    f"and is {here.get(name)} here"
                )

    def _steps(self, recorded: StepMark) -> Iterator[ReplayedStep]:
        """The step that is due where the recorded run took one.

        With another batch size there may be none, or several.
        """
        while self.training.batch is not None:
            yield self._step(recorded if self.training.step + 1 == recorded.step else None)
            self._advance()
        if self.training.step < recorded.step and self.missed is None:
            self.missed = recorded.step

    def _step(self, recorded: StepMark | None) -> ReplayedStep:
        per_sample = PerSampleLosses()
        result = self.training.take_step(per_sample)
        self.settled.add(result.settled)
        loaded = self._publish()
        same = recorded is not None and self._is_version(recorded.digest, loaded)
        row = _as_read(result.row)
        return ReplayedStep(self.policy, row, recorded, same, result.batch, per_sample)

    def _publish(self) -> LoadedPolicy:
        """Write the weights as they are now as a version, and note it as `policy`."""
        step = self.training.step
        state = self.training.learner.live_state()
        loaded = LoadedPolicy(step, None, self._packer.pack(state))
        self._sender.send(loaded, adapter_base=partial(self._packer.base, state))
        self._packer.forget_base()
        weights.prune(self.run_dir, self.settings.checkpoint.keep_policies, pinned={step})
        self.policy = weights.announced(loaded)
        return loaded

    def _is_version(self, digest: str, loaded: LoadedPolicy) -> bool:
        """Whether `digest` is that of the version `loaded`.

        Where that is an adapter, the recorded run may have published it merged.
        """
        if loaded.adapter is None or is_of_adapter(digest):
            return loaded.has_digest(digest)
        learner = self.training.learner
        return LoadedPolicy.of(0, learner.live_state(), learner.dtype).has_digest(digest)


def _as_read(row: dict[str, Any]) -> dict[str, Any]:
    """`row` as it reads from a file of JSON."""
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(row))
    return read
