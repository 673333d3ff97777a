"""What comes of a step: its weights are published, and once they are out, its metrics written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from onstream.pipeline.records import PolicyVersion
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.durability.run_directory import RunDirectory
from onstream.workers.trainer.evaluations import Evaluations
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.metrics_files import MetricsFiles, StepClock
from onstream.workers.trainer.publication.background import Publication
from onstream.workers.trainer.publication.publisher import Publisher
from onstream.workers.trainer.training import StepResult


@dataclass(frozen=True)
class UnpublishedStep:
    """A step whose weights are on their way, and how long it took so far."""

    number: int
    result: StepResult
    times: dict[str, Any]
    publication: Publication


@dataclass(kw_only=True, eq=False)
class StepOutput:
    """Publishes the weights of each step, then writes what is known only when they are out.

    `policy` is the newest version that is out. At most one is on its way. It is out before the next
    one starts, and before a checkpoint, which must name no version that nobody could load.

    `completed` hears of each step whose weights are out, with its row of metrics.
    """

    directory: RunDirectory
    learner: Learner
    publisher: Publisher
    recording: Recording
    metrics: MetricsFiles
    evaluations: Evaluations | None
    policy: PolicyVersion
    completed: Callable[[StepResult, dict[str, Any]], None]
    clock: StepClock = field(default_factory=StepClock)
    _unpublished: UnpublishedStep | None = None

    def __post_init__(self) -> None:
        # Only the optimizer's step changes weights.
        self.learner.before_update(self._wait_until_copied)

    @property
    def pending(self) -> bool:
        """Whether a version is on its way."""
        return self._unpublished is not None

    @property
    def ready(self) -> bool:
        """Whether the version that was on its way is out, or has failed; `collect` says which."""
        return self._unpublished is not None and self._unpublished.publication.done

    def publish(self, number: int, result: StepResult) -> None:
        """Start to publish the weights of the step `number`; a small policy is out on return.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, or Redis has no room for this version or the one before.
        """
        self.complete()
        with self.directory.changing():
            publication = self.publisher.start(number, self.learner.live_state())
            self.clock.published()
            times = self.clock.end_step(result.batch, result.row["tokens"])
            self._unpublished = UnpublishedStep(number, result, times, publication)
            if publication.done:
                self._complete(self._unpublished)
            else:
                self.recording.hold()

    def collect(self) -> None:
        """Write what is known now that a version is out, if it is.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it could not be published.
        """
        if self.ready:
            self.complete()

    def complete(self) -> None:
        """The same for the version on its way, if there is one; waits for it.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it could not be published.
        """
        if self._unpublished is None:
            return
        # Outside of the fence, which the thread needs too.
        self._unpublished.publication.wait()
        with self.directory.changing():
            self._complete(self._unpublished)

    def _complete(self, step: UnpublishedStep) -> None:
        self._unpublished = None
        self.policy = step.publication.result()
        self.recording.stepped(step.number, self.policy.digest, step.result.row)
        row = {**step.result.row, **self._of_the_moment(), **step.times}
        row["publish_s"] = step.publication.seconds
        if self.evaluations:
            self.evaluations.request(step.number)
        self.metrics.write(row, step.result.batch)
        self.completed(step.result, row)

    def _of_the_moment(self) -> dict[str, Any]:
        results = self.evaluations.new_results() if self.evaluations else {}
        return {
            "time": time.time(),
            "publish_bytes": self.publisher.sent.update_bytes,
            "delta_share": self.publisher.sent.changed_share,
            **results,
        }

    def _wait_until_copied(self) -> None:
        if self._unpublished is not None:
            with self.clock.waiting():
                self._unpublished.publication.wait_until_copied()
