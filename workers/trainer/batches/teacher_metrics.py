"""What a step tells of each teacher, where there are several by name. Records in, numbers out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

from onstream.pipeline.record_codec import logprobs_array, mask_array
from onstream.pipeline.records import Rollout, Sample
from onstream.settings.stages import teacher_of
from onstream.workers.trainer.batches.batch_builder import TrainableUnit

TeacherMetrics = dict[str, dict[str, float | None]]


def teacher_metrics(batch: Sequence[TrainableUnit]) -> TeacherMetrics | None:
    """By the name of each teacher: its `share` of the rollouts of `batch`, `kl`, the mean over the
    trained tokens of its rollouts of the generator's logprob less its own (nats), and `latency_s`,
    the mean time that a rollout was with it. None where no teacher scored any.

    `kl` is the sampled reverse KL of the policy that wrote, and not of the one that takes the step.
    """
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    by_teacher: defaultdict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        if (name := rollout.teacher) is not None:
            by_teacher[name].append(rollout)
    return {
        name: {
            "share": len(own) / len(rollouts),
            "kl": _mean(kl for rollout in own for kl in _token_kl(rollout.samples)),
            "latency_s": fmean(_latency_s(rollout) for rollout in own),
        }
        for name, own in sorted(by_teacher.items())
    } or None


def _token_kl(samples: Sequence[Sample]) -> Iterator[float]:
    """The generator's logprob less the teacher's of each trained token of `samples`."""
    for sample in samples:
        if sample.teacher_logprobs is not None:
            generator = logprobs_array(sample.generator_logprobs)
            kl = generator - logprobs_array(sample.teacher_logprobs)
            yield from kl[mask_array(sample.loss_mask) == 1].tolist()


def _latency_s(rollout: Rollout) -> float:
    scored = next(timing for timing in rollout.timings if teacher_of(timing.stage) is not None)
    return scored.done - scored.taken


def _mean(values: Iterator[float]) -> float | None:
    return fmean(found) if (found := list(values)) else None
