"""`[orchestrator]`: batches, groups, staleness, verification, and teachers that run elsewhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from onstream.settings.base import RUN, WORKER, Section, Unit
from onstream.settings.sections.client import (
    JudgeModelSettings,
    TeacherModelSettings,
    TeacherRolloutModelSettings,
)


class SandboxSettings(Section):
    """Limits of one program that `task.scorer = "code"` runs."""

    wall: Annotated[float, WORKER, Unit("s"), Field(gt=0, le=3600)] = 5.0
    """How long all tests of one rollout may take together; less than `verification.timeout`."""
    cpu: Annotated[float, WORKER, Unit("s"), Field(ge=1, le=3600)] = 5.0
    """CPU time of each process, in whole seconds."""
    memory: Annotated[int, WORKER, Unit("MiB"), Field(ge=32, le=1 << 20)] = 256
    """Address space of each process, and the memory of all its processes together."""
    processes: Annotated[int, WORKER, Unit("processes"), Field(ge=1, le=4096)] = 16
    """Processes and threads that a program may have at once."""
    file_size: Annotated[int, WORKER, Unit("MiB"), Field(ge=1, le=1 << 16)] = 16
    """Size of a file that it writes."""
    scratch: Annotated[int, WORKER, Unit("MiB"), Field(ge=1, le=1 << 16)] = 64
    """Size of all files that it writes, which lie in memory."""
    output: Annotated[int, WORKER, Unit("bytes"), Field(ge=1, le=1 << 26)] = 65_536
    """What it may write to standard output; past it, it is killed."""


class VerificationSettings(Section):
    """Scoring of whole answers by the task's scorer."""

    enabled: Annotated[bool | None, RUN] = None
    """Whether rollouts are verified. Unset: yes, unless `deployment.stages` leaves `verify` out."""
    timeout: Annotated[float, WORKER, Unit("s"), Field(gt=0, le=86400)] = 10.0
    """How long a scorer may take for one rollout; past it the rollout scores 0."""
    processes: Annotated[int, WORKER, Unit("processes"), Field(ge=1, le=1024)] = 1
    """Child processes of one verifier; each scores one rollout at a time and can be killed."""
    min_reward: Annotated[float, WORKER, Unit("reward"), Field(ge=-1e9, le=1e9)] = -1e4
    """The least reward that counts. A rollout whose scorer gives less is unscored."""
    max_reward: Annotated[float, WORKER, Unit("reward"), Field(ge=-1e9, le=1e9)] = 1e4
    """The greatest reward that counts. A rollout whose scorer gives more is unscored."""
    max_memory: Annotated[int, WORKER, Unit("MiB"), Field(ge=64, le=1 << 24)] = 4096
    """Memory that one child process may take beyond what importing the scorer took; a scorer that
    asks for more gets a MemoryError.
    """
    in_jobs: Annotated[Literal["never", "slow", "always"], WORKER] = "never"
    """Which rollouts are scored by jobs workers instead of children of the verifier (docs/jobs.md):
    `slow` are those whose problem says `"slow": true`, and those that have taken longer than a
    second."""
    allow_unsandboxed: Annotated[bool, WORKER] = False
    """Let `task.scorer = "code"` run programs on a machine that does not permit a sandbox: they may
    then read what the verifier may.
    """
    sandbox: SandboxSettings = SandboxSettings()


class OrchestratorSettings(Section):
    """What the trainer asks for, and when."""

    batch_size: Annotated[int, RUN, Unit("rollouts"), Field(ge=1, le=1 << 20)] = 128
    """Rollouts of one training step; a multiple of `group_size`."""
    group_size: Annotated[int, RUN, Unit("rollouts"), Field(ge=1, le=4096)] = 4
    """Rollouts of one prompt, which share its computation and give each other's reward a baseline.
    """
    max_off_policy_steps: Annotated[int, RUN, Unit("steps"), Field(ge=0, le=1024)] = 2
    """How many steps ahead of the trainer tickets are issued, and the staleness past which a group
    is dropped. 0 is exact on-policy training."""
    max_backlog: Annotated[int | None, WORKER, Unit("rollouts"), Field(ge=1, le=10**7)] = None
    """No new tickets while a working stream holds more records than this. Unset: 16384, or as many
    as may be under way, where that is more.
    """
    max_dropped_groups: Annotated[int, WORKER, Unit("groups"), Field(ge=0, le=10**6)] = 64
    """The run stops when so many groups in a row, besides those that may be on their way, were
    dropped and none could train: unscored, cut off, stale or dead. 0: it never does. Whole answers
    that are not right, which `keep = "verified"` leaves out, do not count.
    """
    use_token_client: Annotated[bool, RUN] = True
    """`true`: rollouts are token ids in and out. `false`: chat messages, from whose text the
    student's tokens are reconstructed, as `orchestrator.teacher_rollout_model` needs."""
    score_cache: Annotated[int, WORKER, Unit("samples"), Field(ge=0, le=10**8)] = 10_000
    """Scores of external teachers kept in Redis, so that a replay does not ask for them again; 0
    keeps none.
    """
    verification: VerificationSettings = VerificationSettings()
    teacher_model: TeacherModelSettings | None = None
    teacher_rollout_model: TeacherRolloutModelSettings | None = None
    judge_model: JudgeModelSettings | None = None
