"""The few rollouts that `samples.jsonl` shows a person, so that a run can be judged by reading.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onstream.pipeline.records import Rollout, logprobs_array
from onstream.workers.trainer.batches.batch_builder import TrainableUnit

SHOWN = 4  # rollouts a time, each of another unit


def sample_rows(batch: Sequence[TrainableUnit], run: str, step: int) -> list[dict[str, Any]]:
    """One row for the first live rollout of each of the first few units of `batch`, trained in
    `step`.
    """
    return [sample_row(chosen.rollouts[0], run, step) for chosen in batch[:SHOWN]]


def sample_row(rollout: Rollout, run: str, step: int) -> dict[str, Any]:
    """What a person reads of `rollout`, trained in `step`."""
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
        "policy_versions": sorted(
            {span.version for sample in rollout.samples for span in sample.version_spans}
        ),
        "generator_logprob": _total([sample.generator_logprobs for sample in rollout.samples]),
        "teacher_logprob": _total([sample.teacher_logprobs for sample in rollout.samples]),
    }


def _total(fields: Sequence[bytes | None]) -> float | None:
    """Logprob of the whole answer in nats; None where not every sample has one."""
    present = [field for field in fields if field is not None]
    return (
        float(sum(logprobs_array(field).sum() for field in present))
        if len(present) == len(fields)
        else None
    )
