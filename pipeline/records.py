"""The records that travel, in the order of their flow, and how they are encoded and decoded.

Arrays are little-endian `bytes` fields (`<i4` ids, `<f4` logprobs, `u1` masks): a 4,096-token
sample encodes in about 3 µs and 33 KB this way, against 109 µs and 53 KB as lists. The tag of each
record names its schema version: bytes of another version do not decode, and become a dead letter
for that reason.

What `decode_work` and `decode_policy` return has been checked field by field: by the types of the
fields, and by the `check` function of the record. Nothing behind them checks again.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from onstream.pipeline.record_fields import (
    Count,
    FieldError,
    Finite,
    GroupSize,
    ImageDigest,
    Name,
    Number,
    Reason,
    Reward,
    Route,
    Seconds,
    Seed,
    Temperature,
    check_distribution,
    check_ids,
    check_logprobs,
    check_mask,
    check_plain,
    check_route,
    check_temperature,
)
from onstream.pipeline.record_fields import Logprobs as Logprobs
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.stages import StageName as StageName

FinishReason = Literal["stop", "length"]

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]


class RecordError(ValueError):
    """Bytes that are not a record of this version, or one with a field out of its bounds."""


# trainer -> tickets -> generator
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
    """When `worker` of `stage` took the record and was done with it, in seconds since the epoch."""

    stage: StageName
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


# generator -> verify, score or train -> … -> trainer
class Rollout(msgspec.Struct, tag="rollout/1", array_like=True):
    """One answer of the policy to one ticket, with what each stage added and the route to go.

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


# whoever gave up -> train -> trainer
class Tombstone(msgspec.Struct, tag="tombstone/1", array_like=True, frozen=True):
    """The rollout `number` will never come, and why, so that its group does not wait for it."""

    number: Number
    stage: StageName
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
    """A published set of weights. `digest` covers the weight files; `path` is in the run directory.

    With `probe` a generator checks that its engine computes this version; None where the guard is
    off.
    """

    number: Count
    digest: Name
    path: Name
    size_bytes: Count
    probe: Probe | None = None


Work = Ticket | Rollout | Tombstone


def _refuse_extension(code: int, data: memoryview) -> Any:
    raise msgspec.ValidationError(f"an extension of type {code}; expected plain msgpack")


_FIELDS: dict[bytes, tuple[str, ...]] = {
    b"ticket/1": Ticket.__struct_fields__,
    b"rollout/1": Rollout.__struct_fields__,
    b"tombstone/1": Tombstone.__struct_fields__,
}
_TAG_WITHIN = 16  # bytes

_encoder = msgspec.msgpack.Encoder()
_work: msgspec.msgpack.Decoder[Work] = msgspec.msgpack.Decoder(Work, ext_hook=_refuse_extension)
_policy = msgspec.msgpack.Decoder(PolicyVersion)


def encode(record: Work | PolicyVersion) -> bytes:
    """Msgpack bytes of `record`."""
    return _encoder.encode(record)


def decode_work(payload: bytes) -> Work:
    """The ticket, rollout or tombstone in `payload`, every field of it within its bounds.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version, or one with
            a field out of its bounds.
    """
    record = decode_unchecked(payload)
    try:
        if isinstance(record, Rollout):
            check_rollout(record)
        elif isinstance(record, Ticket):
            check_route(record.route)
    except FieldError as error:
        raise RecordError(f"{type(record).__name__.lower()} {record.number}: {error}") from error
    return record


def decode_unchecked(payload: bytes) -> Work:
    """The same without the checks across fields: of a recording, which holds what an earlier
    version of the program has trained on, and of what is only shown.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version, or one with
            a number or text out of its bounds.
    """
    try:
        return _work.decode(payload)
    except UNDECODABLE as error:
        raise RecordError(
            f"{len(payload)} bytes do not decode as a ticket/1, rollout/1 or tombstone/1: "
            f"{_with_name(str(error), payload)}"
        ) from error


def _with_name(error: str, payload: bytes) -> str:
    """`error` with the name of the field, of which msgspec gives the place alone."""
    place = re.search(r"at `\$\[(\d+)\]", error)
    fields = next((names for tag, names in _FIELDS.items() if tag in payload[:_TAG_WITHIN]), ())
    if place is None or not 0 < int(place[1]) <= len(fields):
        return error
    return f"{fields[int(place[1]) - 1]}: {error}"


def decode_policy(payload: bytes) -> PolicyVersion:
    """The policy version in `payload`, every field of it within its bounds.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version, or one with
            a field out of its bounds.
    """
    try:
        policy = _policy.decode(payload)
        if policy.probe is not None:
            check_probe(policy.probe)
    except (*UNDECODABLE, FieldError) as error:
        raise RecordError(f"{len(payload)} bytes do not decode as a policy/1: {error}") from error
    return policy


def check_rollout(rollout: Rollout) -> None:
    """Raise FieldError where a field of `rollout` is at odds with another, or with its bounds."""
    check_route(rollout.route)
    check_temperature(rollout.temperature)
    trained_tokens = 0
    for sample in rollout.samples:
        trained_tokens += check_sample(sample)
    if not trained_tokens:
        raise FieldError("no token is in a loss mask; expected at least one to train on")
    check_plain("messages or info", [rollout.messages, rollout.info])


def check_sample(sample: Sample) -> int:
    """How many tokens are in the loss mask of `sample`.

    Raises:
        FieldError: a field does not fit its C completion tokens.
    """
    tokens = len(sample.loss_mask)
    check_ids("prompt_ids", sample.prompt_ids, len(sample.prompt_ids) // 4)
    check_ids("completion_ids", sample.completion_ids, tokens)
    trained_tokens = check_mask(sample.loss_mask)
    check_logprobs("generator_logprobs", sample.generator_logprobs, tokens)
    end = 0
    for span in sample.version_spans:
        if not end <= span.start <= span.end <= tokens:
            raise FieldError(
                f"policy {span.version} wrote the tokens {span.start} to {span.end}; expected "
                f"spans one behind the other within {tokens} tokens"
            )
        end = span.end
    check_teacher(sample, tokens)
    return trained_tokens


def check_teacher(sample: Sample, tokens: int) -> None:
    """Raise FieldError where what the teacher said of `sample` is no distribution over tokens."""
    if sample.teacher_logprobs is not None:
        check_logprobs("teacher_logprobs", sample.teacher_logprobs, tokens)
    if not tokens:
        return
    ids = sample.teacher_top_ids
    top = sample.teacher_top_logprobs
    tail = sample.teacher_tail_logprobs
    if ids is None and top is None and tail is None:
        return
    if ids is None or top is None:
        raise FieldError("the teacher's likeliest tokens lack their ids or their logprobs")
    places, rest = divmod(len(top), 4 * tokens)
    if not places or rest:
        raise FieldError(
            f"teacher_top_logprobs has {len(top)} bytes; expected {4 * tokens} for each of the k"
        )
    check_ids("teacher_top_ids", ids, tokens * places)
    check_logprobs("teacher_top_logprobs", top, tokens * places)
    if tail is not None:
        check_logprobs("teacher_tail_logprobs", tail, tokens)
    check_distribution(top, tail, tokens)


def check_probe(probe: Probe) -> None:
    """Raise FieldError unless `probe` has k ≥ 1 likeliest tokens for each of its prompts."""
    for prompt in probe.prompts:
        check_ids("a prompt of the probe", prompt, len(prompt) // 4)
    values = len(probe.top_ids) // 4
    if not probe.prompts or not values or values % len(probe.prompts):
        raise FieldError(f"a probe of {len(probe.prompts)} prompts with {values} likeliest tokens")
    check_ids("top_ids", probe.top_ids, values)
    check_logprobs("top_logprobs", probe.top_logprobs, values)


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
