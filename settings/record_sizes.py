"""What the records of a run weigh at their longest, and the room in Redis that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from onstream.settings.root import Settings
from onstream.settings.route import external_teacher, teacher_on, teachers_of
from onstream.settings.stages import FIRST, STAGE_NAMES, STATE_BYTES, StageName

FIXED_BYTES = 1024
"""Of a rollout without its tokens: names, times, rewards, an answer."""
PROMPT_TOKEN_BYTES = 8
"""An int32 id, and four characters of text."""
TOKEN_BYTES = 13
"""An int32 id, a byte of the mask, the generator's float32 logprob, and four characters of text."""
ID_BYTES = 4
"""An int32 id. A token is taken to be a character, which is the most."""
SCORE_BYTES = 4
"""The teacher's float32 logprob of a token."""
ALTERNATIVE_BYTES = 8
"""An int32 id and a float32 logprob."""
TAIL_BYTES = 4
"""The float32 logprob of all tokens outside the k."""
STREAM_OVERHEAD = 1.3
"""What Redis takes for an entry, to its payload."""
KEPT_SCORES_BYTES = 64 << 20
"""Scores of external teachers that Redis keeps."""

MIB = 1 << 20
LEAST_MEMORY_MIB = 1024
MEMORY_STEP_MIB = 256
LEAST_BACKLOG = 16_384
LEAST_UNACKED_BYTES = 256 * MIB
UNACKED_BATCHES = 4
"""A checkpoint is taken at half of what may wait for one: every other step at its longest."""


@dataclass(frozen=True)
class RecordSizes:
    """What a run's records take, and the settings that follow where they are unset.

    `window` is how many rollouts may be under way. `batch_bytes` and `window_bytes` are what Redis
    takes for so many of the longest rollouts.
    """

    tokens: int
    top_k: int
    rollout_bytes: int
    batch_bytes: int
    window: int
    window_bytes: int
    max_memory_mib: int
    max_backlog: int
    max_unacked_bytes: int

    @property
    def derived(self) -> dict[str, str]:
        """What stands for settings that are unset, by name: the value, and how it came about."""
        return {
            "redis.max_memory": f"{self.max_memory_mib} MiB, "
            + _words(self.max_memory_mib, LEAST_MEMORY_MIB, "window + batch + what may wait"),
            "orchestrator.max_backlog": f"{self.max_backlog} rollouts, "
            + _words(self.max_backlog, LEAST_BACKLOG, "the window"),
            "checkpoint.max_unacked_bytes": f"{self.max_unacked_bytes} bytes, "
            + _words(self.max_unacked_bytes, LEAST_UNACKED_BYTES, f"{UNACKED_BATCHES} batches"),
        }


def _words(derived: int, least: int, formula: str) -> str:
    return formula if derived > least else "the least"


def record_sizes(settings: Settings) -> RecordSizes:
    """What the records of `settings` take at their longest.

    With P prompt and C completion tokens, k of the teacher's alternatives, B rollouts a batch and
    W = (1 + `max_off_policy_steps`) × B under way, in bytes:

        rollout = 1024 + 8 P + 13 C,   + 4 C where a teacher scores,   + (8 k + 4) C where k > 0,
                  + 4 (P + characters of task.teacher_prompt) where the teacher has its own prompt
        batch   = 1.3 × B × rollout
        window  = 1.3 × W × rollout, twice for each teacher where there are several by name

    C is the longest completion, or with an environment `task.max_episode`. P is not known, and
    taken to be C. Images are not in it: a record has 66 bytes for each, and Redis
    their files once beside it.

    What is derived, each at least what it was before there was a formula:

    - `max_memory` = window + a batch that has settled and waits for the disk, + what may wait for a
      checkpoint, + 64 MiB of kept scores with an external teacher; all of it beside the share of
      weights with `weights.transport = "redis"`. In MiB, rounded up to 256.
    - `max_backlog` = W.
    - `max_unacked_bytes` = 4 batches.

    The bytes of a token were measured on encoded records (tests/settings/test_record_sizes.py), the
    1.3 on a Redis (docs/delivery.md).
    """
    orchestrator = settings.orchestrator
    tokens = longest_completion(settings)
    top_k = settings.trainer.loss.most_top_k if teacher_on(settings) else 0
    rollout = longest_rollout(settings, scored=teacher_on(settings))
    batch = ceil(STREAM_OVERHEAD * rollout * orchestrator.batch_size)
    window = (1 + orchestrator.max_off_policy_steps) * orchestrator.batch_size
    # What is parked for a teacher that is away does not count in the window.
    windows = max(1, 2 * len(teachers_of(settings)))
    window_bytes = ceil(STREAM_OVERHEAD * rollout * window) * windows
    unacked = max(LEAST_UNACKED_BYTES, UNACKED_BATCHES * batch)
    waiting = settings.checkpoint.max_unacked_bytes or unacked
    scores = KEPT_SCORES_BYTES if external_teacher(settings) is not None else 0
    records_mib = (window_bytes + batch + waiting + scores) / MIB
    memory = MEMORY_STEP_MIB * ceil(records_mib / share_of_records(settings) / MEMORY_STEP_MIB)
    return RecordSizes(
        tokens=tokens,
        top_k=top_k,
        rollout_bytes=rollout,
        batch_bytes=batch,
        window=window,
        window_bytes=window_bytes,
        max_memory_mib=max(LEAST_MEMORY_MIB, memory),
        max_backlog=max(LEAST_BACKLOG, window),
        max_unacked_bytes=unacked,
    )


def longest_rollout(settings: Settings, *, scored: bool) -> int:
    """Bytes of the longest rollout, before or after a teacher has `scored` it."""
    token = TOKEN_BYTES
    if scored:
        token += SCORE_BYTES
        if top_k := settings.trainer.loss.most_top_k:
            token += ALTERNATIVE_BYTES * top_k + TAIL_BYTES
    whole = FIXED_BYTES + (PROMPT_TOKEN_BYTES + token) * longest_completion(settings)
    return whole + _teacher_prompt_bytes(settings)


def _teacher_prompt_bytes(settings: Settings) -> int:
    """Of the teacher's own prompt: the student's, and what the settings put around it."""
    own = settings.task.teacher_prompt
    if not own.differs or not teacher_on(settings):
        return 0
    examples = [text for example in own.examples for text in example.values()]
    texts = [own.system or "", own.template or "", *map(str, examples)]
    return ID_BYTES * (longest_completion(settings) + sum(map(len, texts)))


def longest_entry(settings: Settings, stage: StageName) -> int:
    """Bytes of the longest record that the stream of `stage` may hold: tickets are short."""
    plays = settings.task.environment is not None
    if stage == FIRST and not plays:
        return FIXED_BYTES
    state = STATE_BYTES if plays and stage in (FIRST, "act") else 0
    return state + longest_rollout(
        settings, scored=stage == STAGE_NAMES[-1] and teacher_on(settings)
    )


def longest_completion(settings: Settings) -> int:
    """Tokens of the longest completion, or with an environment episode, that may come."""
    if settings.task.environment is not None:
        return settings.task.max_episode
    teacher = settings.orchestrator.teacher_rollout_model
    if teacher is not None and teacher.max_completion is not None:
        return teacher.max_completion
    return settings.inference.sampling.max_completion


def share_of_records(settings: Settings) -> float:
    """The share of Redis's memory that is for records, and not for weights."""
    return 1 - settings.weights.max_share if settings.weights.transport == "redis" else 1.0


def max_memory_mib(settings: Settings) -> int:
    """The memory limit of the Redis that `onstream up` starts, in MiB."""
    return settings.redis.max_memory or record_sizes(settings).max_memory_mib


def max_backlog(settings: Settings) -> int:
    """How many records a working stream may hold while new tickets are issued."""
    return settings.orchestrator.max_backlog or record_sizes(settings).max_backlog


def max_unacked_bytes(settings: Settings) -> int:
    """How much of Redis records may hold that wait for a checkpoint."""
    return settings.checkpoint.max_unacked_bytes or record_sizes(settings).max_unacked_bytes
