"""The records that travel, in the order of their flow.

Arrays are little-endian `bytes` fields (`<i4` ids, `<f4` logprobs, `u1` masks): a 4,096-token
sample encodes in about 3 µs and 33 KB this way, against 109 µs and 53 KB as lists. The tag of each
record names its schema version.

What a bound of a number or text can say is said by its type, and msgspec checks it as it decodes.
`record_codec` encodes and decodes, and checks what is in bytes or lies between two fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from onstream.settings.stages import STAGE_NAMES, STATE_BYTES, teacher_of
from onstream.settings.stages import StageName as StageName

MOST: Final = 2**53 - 1
"""The greatest whole number that a record may hold: JSON and Lua keep it exactly."""
REASON_CHARACTERS: Final = 4000
"""What is kept of a reason when it is written; far under the bound of its type."""

FinishReason = Literal["stop", "length"]
Bound = Literal["turns", "tokens", "context"]
"""What may end an episode before its environment does."""

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]
Logprobs = npt.NDArray[np.float32]
Number = Annotated[int, Meta(ge=1, le=MOST)]
Count = Annotated[int, Meta(ge=0, le=MOST)]
GroupSize = Annotated[int, Meta(ge=1, le=1 << 20)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Temperature = Annotated[float, Meta(ge=0, le=10)]
Reward = Annotated[float, Meta(ge=-1e9, le=1e9)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Name = Annotated[str, Meta(max_length=4096)]
Reason = Annotated[str, Meta(max_length=1 << 16)]
State = Annotated[bytes, Meta(max_length=STATE_BYTES)]
ImageDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Hop = Annotated[str, Meta(max_length=64)]
"""The name of a stream; `record_codec` checks that there can be such a one."""
Route = Annotated[list[Hop], Meta(min_length=1, max_length=len(STAGE_NAMES))]


# trainer -> generate or act -> generator or environment
class Ticket(msgspec.Struct, tag="ticket/1", array_like=True, frozen=True):
    """A request for one rollout, which gets the same `number`. Numbers count up from 1 in a run.

    Tickets of one group have consecutive numbers and ask the same problem: `index` of the task's
    train split. `requeued_from` is the number of a dead rollout that this one replaces; that one
    stays dead.
    """

    number: Number
    group: Count
    group_size: GroupSize
    index: Count
    seed: Seed
    min_policy_version: Count
    route: Route
    requeued_from: Number | None = None


class VersionSpan(msgspec.Struct, array_like=True, frozen=True):
    """The completion tokens `start` ≤ t < `end` were sampled by policy `version`."""

    version: Count
    start: Count
    end: Count


class Timing(msgspec.Struct, array_like=True, frozen=True):
    """When `worker` of `stage`, or of a teacher by name, took the record and was done with it, in
    seconds since the epoch.
    """

    stage: Hop
    worker: Name
    taken: Seconds
    done: Seconds


class Sample(msgspec.Struct, array_like=True):
    """One prompt and completion: P prompt tokens, C completion tokens, k teacher alternatives.

    There are k alternatives at each completion token. Tokens of an environment or a tool stand in
    the completion with mask 0, in no version span.
    """

    prompt_ids: bytes  # <i4 [P]
    completion_ids: bytes  # <i4 [C]
    loss_mask: bytes  # u1 [C]
    generator_logprobs: bytes  # <f4 [C], nats, of the distribution really sampled from
    version_spans: list[VersionSpan]
    completion_text: str
    teacher_logprobs: bytes | None = None  # <f4 [C], nats, at temperature 1
    teacher_top_ids: bytes | None = None  # <i4 [C, k]
    teacher_top_logprobs: bytes | None = None  # <f4 [C, k]
    teacher_tail_logprobs: bytes | None = None  # <f4 [C], logprob of everything outside the k
    # digests of the images that the prompt shows, in order; their tokens are in prompt_ids
    images: list[ImageDigest] = []
    # <i4, the prompt behind which the teacher reads the completion; None where it is the student's
    teacher_prompt_ids: bytes | None = None


# act -> generate -> generator -> act -> environment -> generate -> …
class Episode(msgspec.Struct, tag="episode/1", array_like=True):
    """A rollout of several turns, between two of them: all there is of it.

    `messages` are those so far, each turn of the student one of them, and `tools` the schemas of
    what it may call. `state` is the environment's own, msgpack. `reward` is the sum of what its
    steps gave. `turns` counts the student's turns, of which `finish_reason` is the last one's;
    `bound` says that there was no room for another. It ends as a rollout.
    """

    ticket: Ticket
    messages: list[dict[str, Any]]
    info: dict[str, Any]
    tools: list[dict[str, Any]]
    state: State
    temperature: Temperature
    route: Route
    samples: list[Sample] = []
    turns: Count = 0
    finish_reason: FinishReason = "stop"
    bound: Bound | None = None
    reward: Reward = 0.0
    reward_parts: Annotated[dict[str, Finite], Meta(max_length=256)] = {}
    timings: Annotated[list[Timing], Meta(max_length=256)] = []

    @property
    def number(self) -> int:
        """The number of the rollout that it becomes."""
        return self.ticket.number


# generator or environment -> verify, score or train -> … -> trainer
class Rollout(msgspec.Struct, tag="rollout/1", array_like=True):
    """One answer of the policy to one ticket, or an episode that has ended, with what each stage
    added and the route to go.

    `info` is what the task's scorer needs beside the messages (the answer, say). `reward` is None
    where no verifier was on the route, or where the scorer failed; then `unscored` says why.
    """

    number: Number
    group: Count
    group_size: GroupSize
    index: Count
    messages: list[dict[str, Any]]
    info: dict[str, Any]
    samples: Annotated[list[Sample], Meta(min_length=1)]
    temperature: Temperature
    finish_reason: FinishReason
    route: Route
    timings: Annotated[list[Timing], Meta(max_length=256)] = []
    reward: Reward | None = None
    reward_parts: Annotated[dict[str, Finite], Meta(max_length=256)] = {}
    unscored: Reason | None = None
    scored_by: Name | None = None

    @property
    def teacher(self) -> str | None:
        """The name of the teacher that has scored it; None where none has."""
        named = (teacher_of(timing.stage) for timing in self.timings)
        return next((name for name in named if name is not None), None)


# whoever gave up -> train -> trainer
class Tombstone(msgspec.Struct, tag="tombstone/1", array_like=True, frozen=True):
    """The rollout `number` will never come, and why, so that its group does not wait for it."""

    number: Number
    stage: Hop
    reason: Reason


class Probe(msgspec.Struct, array_like=True, frozen=True):
    """What the trainer computes, with the weights of a version, after each of N fixed prompts.

    For each prompt it holds the k likeliest next ids, likeliest first, with their logprobs.
    """

    prompts: list[bytes]  # N times <i4 [P]
    top_ids: bytes  # <i4 [N, k]
    top_logprobs: bytes  # <f4 [N, k], nats, at temperature 1


# trainer -> every generator (broadcast: the newest is a key, announcements a stream without a
# group)
class PolicyVersion(msgspec.Struct, tag="policy/1", array_like=True, frozen=True):
    """A published set of weights. `digest` covers the tensors; `path` is in the run directory.

    With `probe` a generator checks that its engine computes this version; None where an older
    trainer announced it.
    """

    number: Count
    digest: Name
    path: Name
    size_bytes: Count
    probe: Probe | None = None


Work = Ticket | Episode | Rollout | Tombstone
