"""`metrics.jsonl` and `samples.jsonl` as the trainer writes them, and the times of its steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onstream.pipeline.record_codec import logprobs_array, mask_array
from onstream.pipeline.records import Rollout, Timing
from onstream.pipeline.run_files.json_lines import JsonLines, cut
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.settings.stages import StageName, stage_of
from onstream.workers.trainer.batches.batch_builder import TrainableUnit

log = get_logger()

SHOWN = 4  # rollouts a time, each of another unit


class MetricsFiles:
    """A row of metrics for each step, and a few samples now and then, from `step` on.

    Rows of later steps are cut off: the trainer before this one wrote them after its last
    checkpoint, and their steps are taken again.
    """

    def __init__(self, settings: Settings, step: int) -> None:
        self._run = settings.run.name
        self._sample_interval = settings.trainer.sample_interval
        self._metrics = _opened(settings.run_dir / "metrics.jsonl", step)
        self._samples = _opened(settings.run_dir / "samples.jsonl", step)

    def write(self, row: dict[str, Any], batch: Sequence[TrainableUnit]) -> None:
        """Write the metrics of a step, and samples of the `batch` it trained on where it is time.

        Raises:
            OSError: the disk is full.
        """
        step = row["step"]
        self._metrics.write(row)
        if step % self._sample_interval == 0 or step == 1:
            for sample in sample_rows(batch, self._run, step):
                self._samples.write(sample)

    def sync(self) -> None:
        """Make what was written durable."""
        self._metrics.sync()
        self._samples.sync()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._samples.close()


class StepClock:
    """Times the steps. Each is `start_step`, `learned`, `published`, `end_step`, in this order.

    In a `waiting` the trainer waits for a version to be published. In a `checkpointing`, or a
    `waiting_for_checkpoint` while it learns, it stands still for a checkpoint.
    """

    def __init__(self) -> None:
        now = time.monotonic()
        self._waiting_since = now
        self._last_step_ended = now
        self._started = now
        self._batch_came = time.time()
        self._learned = now
        self._published = now
        self._waited_s = 0.0
        self._waited_for_checkpoint_s = 0.0
        self._checkpoint_s = 0.0

    def restart(self) -> None:
        """Count from now, as if a step had just ended."""
        self._waiting_since = time.monotonic()
        self._last_step_ended = self._waiting_since

    def start_waiting(self) -> None:
        """The trainer waits for data from now on; what it did before (a checkpoint) is no wait."""
        self._waiting_since = time.monotonic()

    def start_step(self) -> None:
        """A batch is there."""
        self._started = time.monotonic()
        self._batch_came = time.time()
        self._waited_s = 0.0
        self._waited_for_checkpoint_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The step waits meanwhile for the version before to be copied."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - began

    @contextmanager
    def waiting_for_checkpoint(self) -> Iterator[None]:
        """The step waits meanwhile for a checkpoint to be copied."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_for_checkpoint_s += time.monotonic() - began

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """A checkpoint is taken meanwhile, between two steps."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._checkpoint_s += time.monotonic() - began

    def learned(self) -> None:
        """The optimizer has taken its step."""
        self._learned = time.monotonic()

    def published(self) -> None:
        """The new weights are announced, or on their way; the trainer goes on."""
        self._published = time.monotonic()

    def end_step(self, batch: Sequence[TrainableUnit], tokens: float) -> dict[str, Any]:
        """The metrics of the step's time, by their names in metrics.jsonl."""
        now = time.monotonic()
        rollouts = [rollout for unit in batch for rollout in unit.rollouts]
        elapsed_s = now - self._last_step_ended
        waited_s = self._waited_s + self._waited_for_checkpoint_s
        learning_s = self._learned - self._started - waited_s
        wait_s = self._started - self._waiting_since
        metrics = {
            "wait_s": wait_s,
            "waited_for": waited_for(rollouts, self._batch_came - wait_s, self._batch_came),
            "step_s": self._published - self._started,
            "publish_wait_s": self._published - self._learned + self._waited_s,
            "checkpoint_wait_s": self._checkpoint_s + self._waited_for_checkpoint_s,
            "tokens_per_s": tokens / learning_s,
            "elapsed_s": elapsed_s,
            "rollouts_per_s": len(rollouts) / elapsed_s,
        }
        self._waiting_since = now
        self._last_step_ended = now
        self._checkpoint_s = 0.0
        return metrics


def waited_for(rollouts: Sequence[Rollout], start: float, end: float) -> dict[StageName, float]:
    """Seconds between `start` and `end`, while the trainer waited for its batch, by stage.

    The rollout that came last was meanwhile in the hands of one stage after the other, or in the
    stream before it, which counts as that stage's too. `train` is the rest: the way to the trainer,
    and what it did with its records. Times are in seconds since the epoch; clocks of two machines
    differ, so a stage's time ends no earlier than that of the one before.
    """
    seconds: defaultdict[StageName, float] = defaultdict(float)
    since = start
    for timing in max((rollout.timings for rollout in rollouts), key=_last_done, default=[]):
        until = min(max(timing.done, since), end)
        seconds[stage_of(timing.stage)] += until - since
        since = until
    seconds["train"] += end - since
    return {stage: spent for stage, spent in seconds.items() if spent}


def _last_done(timings: Sequence[Timing]) -> float:
    return timings[-1].done if timings else 0.0


def _opened(path: Path, step: int) -> JsonLines:
    if lines := cut(path, lambda row: bool(row["step"] <= step)):
        log.info("lines past the checkpoint cut off", file=path.name, lines=lines)
    return JsonLines(path)


def sample_rows(batch: Sequence[TrainableUnit], run: str, step: int) -> list[dict[str, Any]]:
    """One row for the first live rollout of each of the first few units that `step` trained."""
    return [sample_row(unit.rollouts[0], run, step) for unit in batch[:SHOWN]]


def sample_row(rollout: Rollout, run: str, step: int) -> dict[str, Any]:
    """What a person reads of `rollout`, trained in `step`. The field `uid` is `run/number`."""
    versions = {span.version for sample in rollout.samples for span in sample.version_spans}
    return {
        "step": step,
        "uid": f"{run}/{rollout.number}",
        "group": rollout.group,
        "messages": rollout.messages,
        "completions": [sample.completion_text for sample in rollout.samples],
        "finish_reason": rollout.finish_reason,
        "reward": rollout.reward,
        "reward_parts": rollout.reward_parts,
        "unscored": rollout.unscored,
        "policy_versions": sorted(versions),
        "generator_logprob": _total(
            [(sample.generator_logprobs, sample.loss_mask) for sample in rollout.samples]
        ),
        "teacher_logprob": _total(
            [(sample.teacher_logprobs, sample.loss_mask) for sample in rollout.samples]
        ),
    }


def _total(fields: Sequence[tuple[bytes | None, bytes]]) -> float | None:
    """Logprob in nats of all that is in the masks; None where not every sample has one."""
    total = 0.0
    for logprobs, mask in fields:
        if logprobs is None:
            return None
        total += float(logprobs_array(logprobs)[mask_array(mask) == 1].sum())
    return total
