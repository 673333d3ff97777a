"""The verifier's pool of child processes, and what becomes of the verdicts of its scorer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.pipeline.child_processes.messages import Start
from onstream.pipeline.child_processes.pool import ChildPool
from onstream.settings.root import Settings
from onstream.settings.sections.orchestrator import OrchestratorSettings, VerificationSettings
from onstream.workers.verifier.scorer_messages import ScoringRequest, Verdict

if TYPE_CHECKING:
    # Its import brings numpy, and the scorer is tried before anything may be slow.
    from onstream.pipeline.records import Rollout

LOADER = "onstream.workers.verifier.scorer_process:load"

TIMED_OUT = Verdict(0.0, {"timed_out": 1.0})
CRASHED = Verdict(0.0, {"crashed": 1.0})


class ScorerPool(ChildPool[ScoringRequest, Verdict]):
    """Scores completions in `orchestrator.verification.processes` processes.

    A completion that runs past `verification.timeout` scores 0 (part `timed_out`), as does one
    whose process dies twice (part `crashed`).
    """

    def __init__(
        self, settings: Settings, *, timeout_s: float | None = None, processes: int | None = None
    ) -> None:
        """`timeout_s` and `processes` stand in for the settings' own."""
        verification = settings.orchestrator.verification
        super().__init__(
            _start_message(settings),
            reply_type=Verdict,
            timed_out=TIMED_OUT,
            crashed=CRASHED,
            timeout_s=timeout_s or verification.timeout,
            processes=processes or verification.processes,
        )

    @property
    def problem(self) -> str:
        """Children wait for nothing."""
        return ""

    def score(
        self, key: int, question: Sequence[Mapping[str, Any]], answer: str, info: dict[str, Any]
    ) -> None:
        """Queue an answer for scoring; `collect` gives its verdict under `key`.

        Scorers get no question: what they need of it is in `info`.
        """
        self.submit(key, ScoringRequest(answer, info))


def final_answer(rollout: Rollout) -> str:
    """What the scorer gets: the text of the last sample, which comes after all tool calls."""
    return rollout.samples[-1].completion_text


def within_bounds(verdict: Verdict, verification: VerificationSettings) -> Verdict:
    """`verdict`, unscored where its reward is out of bounds; without parts that are not finite.

    One absurd reward would take a whole batch's gradient with it.
    """
    parts = {name: part for name, part in verdict.parts.items() if math.isfinite(part)}
    least = verification.min_reward
    most = verification.max_reward
    reward = verdict.reward
    if reward is None or least <= reward <= most:
        return msgspec.structs.replace(verdict, parts=parts)
    reason = (
        f"the scorer gave the reward {reward:g}; expected {least:g} to {most:g} "
        "(orchestrator.verification.min_reward and max_reward)"
    )
    return msgspec.structs.replace(verdict, reward=None, parts=parts, unscored=reason)


def write_verdict(rollout: Rollout, verdict: Verdict) -> None:
    """Write `verdict` into `rollout`."""
    rollout.reward = verdict.reward
    rollout.reward_parts = verdict.parts
    rollout.unscored = verdict.unscored


def _start_message(settings: Settings) -> Start:
    """What the fork server is told: the settings that the scorer needs, and no secrets."""
    verification = settings.orchestrator.verification
    scorer_settings = Settings(
        task=settings.task, orchestrator=OrchestratorSettings(verification=verification)
    )
    sections = scorer_settings.model_dump_json(
        include={"task": True, "orchestrator": {"verification"}}
    )
    return Start(LOADER, "scorer", sections.encode(), verification.max_memory << 20)
