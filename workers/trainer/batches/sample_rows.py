"""The rows of `samples.jsonl`: a few rollouts for a person to read. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onstream.pipeline.records import Rollout, logprobs_array
from onstream.workers.trainer.batches.batch_builder import TrainableUnit

SHOWN = 4  # rollouts a time, each of another unit


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
        "generator_logprob": _total([sample.generator_logprobs for sample in rollout.samples]),
        "teacher_logprob": _total([sample.teacher_logprobs for sample in rollout.samples]),
    }


def _total(fields: Sequence[bytes | None]) -> float | None:
    """Logprob of the whole answer in nats; None where not every sample has one."""
    present = [field for field in fields if field is not None]
    if len(present) < len(fields):
        return None
    return float(sum(logprobs_array(field).sum() for field in present))
