"""The records that travel, in the order of their flow, and how they are encoded and decoded.

Arrays are little-endian `bytes` fields (`<i4` ids, `<f4` logprobs, `u1` masks): a 4,096-token
sample encodes in about 3 µs and 33 KB this way, against 109 µs and 53 KB as lists. The tag of each
record names its schema version: bytes of another version do not decode, and become a dead letter
for that reason.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from onstream.settings.decoding import UNDECODABLE
from onstream.settings.stages import StageName as StageName

FinishReason = Literal["stop", "length"]

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]


class RecordError(ValueError):
    """Bytes that are not a record of this version."""


# trainer -> tickets -> generator
class Ticket(msgspec.Struct, tag="ticket/1", array_like=True, frozen=True):
    """A request for one rollout, which gets the same `number`. Numbers count up from 1 in a run.

    Tickets of one group have consecutive numbers and ask the same problem: `index` of the task's
    train split. `requeued_from` is the number of a dead rollout that this one replaces; that one
    stays dead.
    """

    number: int
    group: int
    group_size: int
    index: int
    seed: int
    min_policy_version: int
    route: list[StageName]
    requeued_from: int | None = None


class VersionSpan(msgspec.Struct, array_like=True, frozen=True):
    """The completion tokens `start` ≤ t < `end` were sampled by policy `version`."""

    version: int
    start: int
    end: int


class Timing(msgspec.Struct, array_like=True, frozen=True):
    """When `worker` of `stage` took the record and was done with it, in seconds since the epoch."""

    stage: StageName
    worker: str
    taken: float
    done: float


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
    images: list[str] = []


# generator -> verify, score or train -> … -> trainer
class Rollout(msgspec.Struct, tag="rollout/1", array_like=True):
    """One answer of the policy to one ticket, with what each stage added and the route to go.

    `info` is what the task's scorer needs beside the messages (the answer, say). `reward` is None
    where no verifier was on the route, or where the scorer failed; then `unscored` says why.
    """

    number: int
    group: int
    group_size: int
    index: int
    messages: list[dict[str, Any]]
    info: dict[str, Any]
    samples: list[Sample]
    temperature: float
    finish_reason: FinishReason
    route: list[StageName]
    timings: list[Timing] = []
    reward: float | None = None
    reward_parts: dict[str, float] = {}
    unscored: str | None = None
    scored_by: str | None = None


# whoever gave up -> train -> trainer
class Tombstone(msgspec.Struct, tag="tombstone/1", array_like=True, frozen=True):
    """The rollout `number` will never come, and why, so that its group does not wait for it."""

    number: int
    stage: StageName
    reason: str


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
    """A published set of weights. `digest` covers the weight files; `path` is in the run directory.

    With `probe` a generator checks that its engine computes this version; None where the guard is
    off.
    """

    number: int
    digest: str
    path: str
    size_bytes: int
    probe: Probe | None = None


Work = Ticket | Rollout | Tombstone

_encoder = msgspec.msgpack.Encoder()
_work: msgspec.msgpack.Decoder[Work] = msgspec.msgpack.Decoder(Work)
_policy = msgspec.msgpack.Decoder(PolicyVersion)


def encode(record: Work | PolicyVersion) -> bytes:
    """Msgpack bytes of `record`."""
    return _encoder.encode(record)


def decode_work(payload: bytes) -> Work:
    """The ticket, rollout or tombstone in `payload`.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version.
    """
    try:
        return _work.decode(payload)
    except UNDECODABLE as error:
        raise RecordError(
            f"{len(payload)} bytes do not decode as a ticket/1, rollout/1 or tombstone/1: {error}"
        ) from error


def decode_policy(payload: bytes) -> PolicyVersion:
    """The policy version in `payload`.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version.
    """
    try:
        return _policy.decode(payload)
    except UNDECODABLE as error:
        raise RecordError(f"{len(payload)} bytes do not decode as a policy/1: {error}") from error


def ids_array(field: bytes) -> Ids:
    """A writable int32 copy of an ids field: the wire's own is read-only and pins the reply."""
    return np.frombuffer(field, dtype="<i4").astype(np.int32)


def logprobs_array(field: bytes) -> Logprobs:
    """A writable float32 copy of a logprobs field."""
    return np.frombuffer(field, dtype="<f4").astype(np.float32)


def mask_array(field: bytes) -> Mask:
    """A writable uint8 copy of a mask field."""
    return np.frombuffer(field, dtype=np.uint8).copy()


def ids_bytes(ids: npt.ArrayLike) -> bytes:
    """Token ids as a record carries them."""
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def logprobs_bytes(logprobs: npt.ArrayLike) -> bytes:
    """Logprobs as a record carries them."""
    return np.ascontiguousarray(logprobs, dtype="<f4").tobytes()


def mask_bytes(mask: npt.ArrayLike) -> bytes:
    """A 0/1 mask as a record carries it."""
    return np.ascontiguousarray(mask, dtype=np.uint8).tobytes()
