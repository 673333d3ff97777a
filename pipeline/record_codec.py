"""How records are encoded, decoded and checked.

What `decode_work` and `decode_policy` return has been checked field by field: by the types of the
fields as they are decoded, and by the functions here, where a field is in bytes or lies between two
others. Nothing behind them checks again. Bytes of another schema version do not decode, and become
a dead letter for that reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from onstream.pipeline.records import (
    MOST,
    Episode,
    Ids,
    Logprobs,
    Mask,
    PolicyVersion,
    Probe,
    Rollout,
    Sample,
    Ticket,
    Timing,
    Tombstone,
    Work,
)
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.stages import STAGE_NAMES, is_route, is_stream

GREATEST_LOGPROB: Final = 2.0**-9
"""In nats. No logprob is above 0, but for the rounding of the program that computed it."""
LEAST_LOGPROB: Final = -(2.0**15)
"""In nats. No model gives a token less: a smaller value is a mistake."""
_LOGPROB_BYTES: Final = bytes([*range(0x3B), *range(0x80, 0xC7)])
"""What the highest byte of a float32 between these two may be: its sign and most of its exponent.
They are powers of 2 for the sake of this: a look at a quarter of the bytes tells.
"""
SUM_TOLERANCE: Final = 0.05
"""How far the probabilities of the k likeliest tokens and the tail may be from 1 together: logprobs
rounded to bfloat16 are up to 0.01 off.
"""
LEAST_TEMPERATURE: Final = 1e-3
"""Of a temperature that is not 0."""

_LOGPROBS: Final = np.dtype("<f4")
_IDS: Final = np.dtype("<i4")
_IDS_UNSIGNED: Final = np.dtype("<u4")  # an id below 0 is one of 2³¹ or more so
_LONG_BYTES: Final = 6000
_json = msgspec.json.Encoder()

_FIELDS: dict[bytes, tuple[str, ...]] = {
    b"episode/1": Episode.__struct_fields__,
    b"ticket/1": Ticket.__struct_fields__,
    b"rollout/1": Rollout.__struct_fields__,
    b"tombstone/1": Tombstone.__struct_fields__,
}
_TAG_WITHIN = 16  # bytes


class RecordError(ValueError):
    """Bytes that are not a record of this version, or one with a field out of its bounds."""


class FieldError(ValueError):
    """A field of a record is out of its bounds; the message says which, and what was expected."""


def _refuse_extension(code: int, data: memoryview) -> Any:
    raise msgspec.ValidationError(f"an extension of type {code}; expected plain msgpack")


_encoder = msgspec.msgpack.Encoder()
_work: msgspec.msgpack.Decoder[Work] = msgspec.msgpack.Decoder(Work, ext_hook=_refuse_extension)
_policy = msgspec.msgpack.Decoder(PolicyVersion)


def encode(record: Work | PolicyVersion) -> bytes:
    """Msgpack bytes of `record`."""
    return _encoder.encode(record)


def decode_work(payload: bytes) -> Work:
    """The ticket, episode, rollout or tombstone in `payload`, every field of it within its bounds.

    Raises:
        RecordError: the bytes are not msgpack, or a record of another schema version, or one with
            a field out of its bounds.
    """
    record = decode_unchecked(payload)
    try:
        if isinstance(record, Rollout):
            check_rollout(record)
        elif isinstance(record, Episode):
            check_episode(record)
        elif isinstance(record, Ticket):
            check_route(record.route)
        else:
            check_stream(record.stage)
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
            f"{len(payload)} bytes do not decode as a ticket/1, episode/1, rollout/1 or "
            f"tombstone/1: {_with_name(str(error), payload)}"
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


def read_number(field: bytes) -> int:
    """The number in the field `n` of a stream entry; 0 where it is none that could be issued."""
    if len(field) > len(str(MOST)) or not field.isdigit():
        return 0
    number = int(field)
    return number if number <= MOST else 0


def check_rollout(rollout: Rollout) -> None:
    """Raise FieldError where a field of `rollout` is at odds with another, or with its bounds."""
    check_route(rollout.route)
    check_timings(rollout.timings)
    check_temperature(rollout.temperature)
    trained_tokens = 0
    for sample in rollout.samples:
        trained_tokens += check_sample(sample)
    if not trained_tokens:
        raise FieldError("no token is in a loss mask; expected at least one to train on")
    check_plain("messages or info", [rollout.messages, rollout.info])


def check_episode(episode: Episode) -> None:
    """Raise FieldError where a field of `episode` is at odds with another, or with its bounds."""
    check_route(episode.ticket.route)
    check_route(episode.route)
    check_timings(episode.timings)
    check_temperature(episode.temperature)
    for sample in episode.samples:
        check_sample(sample)
    if bool(episode.samples) != bool(episode.turns):
        raise FieldError(f"{len(episode.samples)} samples of {episode.turns} turns")
    check_plain("messages, info or tools", [episode.messages, episode.info, episode.tools])


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
    if sample.teacher_prompt_ids is not None:
        check_teacher_prompt(sample.teacher_prompt_ids, len(sample.images))
    check_teacher(sample, tokens)
    return trained_tokens


def check_teacher_prompt(ids: bytes, images: int) -> None:
    """Raise FieldError unless `ids` is a prompt, of a sample that shows no `images`."""
    check_ids("teacher_prompt_ids", ids, len(ids) // 4)
    if images:
        raise FieldError(f"teacher_prompt_ids beside {images} images; expected one without images")


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


def check_route(route: Sequence[str]) -> None:
    """Raise FieldError unless `route` ends at the trainer, and names each stage once, in order.

    For `score` it may name the stream of one teacher.
    """
    if not is_route(tuple(route)):
        raise FieldError(
            f"the route is {' → '.join(route)}; "
            f"expected stages in the order of the flow, with {STAGE_NAMES[-1]!r} as the last"
        )


def check_timings(timings: Sequence[Timing]) -> None:
    """Raise FieldError where one of `timings` is of a stage that there cannot be."""
    for timing in timings:
        check_stream(timing.stage)


def check_stream(name: str) -> None:
    """Raise FieldError where no stream can have `name`."""
    if not is_stream(name):
        raise FieldError(f"a stage {name!r}; expected one of {', '.join(STAGE_NAMES)}")


def check_temperature(temperature: float) -> None:
    """Raise FieldError for one above 0 so small that dividing by it leaves no finite number."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise FieldError(f"temperature {temperature:g}; expected 0, or {LEAST_TEMPERATURE} to 10")


def check_ids(name: str, field: bytes, count: int) -> None:
    """Raise FieldError unless `field` is `count` ≥ 1 token ids below 2³¹."""
    if len(field) != 4 * count or not count:
        raise _wrong_length(name, field, count)
    if not _all_positive(field):
        raise FieldError(f"{name} has a token id below 0; expected 0 to {(1 << 31) - 1}")


def check_mask(mask: bytes) -> int:
    """How many bytes of `mask` are 1.

    Raises:
        FieldError: one is neither 0 nor 1.
    """
    ones = mask.count(1)
    if ones != len(mask) and (other := mask.translate(None, b"\0\1")):
        raise FieldError(f"loss_mask has the byte {other[0]}; expected 0 or 1 for each token")
    return ones


def check_logprobs(name: str, field: bytes, count: int) -> None:
    """Raise FieldError unless `field` is `count` logprobs within their bounds."""
    if len(field) != 4 * count:
        raise _wrong_length(name, field, count)
    if not _all_logprobs(field):
        values = np.frombuffer(field, _LOGPROBS)
        raise FieldError(
            f"{name} has the values {values.min():g} to {values.max():g}; "
            f"expected {LEAST_LOGPROB:g} to 0, in nats"
        )


def is_logprob(value: float) -> bool:
    """Whether `value`, in nats, is within the bounds of a logprob. NaN is not."""
    return LEAST_LOGPROB < value < GREATEST_LOGPROB


def check_distribution(top: bytes, tail: bytes | None, tokens: int) -> None:
    """Raise FieldError unless the probabilities of the `top` k and the `tail` can add up to 1.

    Args:
        top: the logprobs of the k likeliest tokens, <f4 [tokens, k].
        tail: the logprob of all others together, <f4 [tokens]; None where it is unknown.
        tokens: how many positions there are.
    """
    sums = np.exp(np.frombuffer(top, _LOGPROBS).reshape(tokens, -1)).sum(axis=1)
    expected = "at most 1"
    if tail is not None:
        sums += np.exp(np.frombuffer(tail, _LOGPROBS))
        expected = "1"
    least = sums.min()
    most = sums.max()
    if most > 1 + SUM_TOLERANCE or (tail is not None and least < 1 - SUM_TOLERANCE):
        raise FieldError(
            "the teacher's likeliest tokens and the tail have probabilities that add up to "
            f"{least:.3f} to {most:.3f}; expected {expected}, within {SUM_TOLERANCE}"
        )


def check_plain(name: str, value: Any) -> None:
    """Raise FieldError unless `value` can be written as JSON: it goes to files that people read."""
    try:
        _json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise FieldError(f"{name} holds what JSON cannot: {error}") from error


# The same two questions in the way that is faster for fields of that length: numpy's calls cost
# more than the work on a short one.


def _all_positive(ids: bytes) -> bool:
    if len(ids) < _LONG_BYTES:
        return ids[3::4].isascii()  # the highest byte of each: below 128 where its sign is +
    values = np.frombuffer(ids, _IDS_UNSIGNED)
    return bool(values[values.argmax()] < 1 << 31)


def _all_logprobs(logprobs: bytes) -> bool:
    if len(logprobs) < _LONG_BYTES:
        return not logprobs[3::4].translate(None, _LOGPROB_BYTES)
    values = np.frombuffer(logprobs, _LOGPROBS)
    # Written so that NaN, which both are then, is refused too.
    return bool(
        values[values.argmin()] > LEAST_LOGPROB and values[values.argmax()] < GREATEST_LOGPROB
    )


def _wrong_length(name: str, field: bytes, count: int) -> FieldError:
    expected = f"{4 * count}: 4 for each of {count} values" if count else "4 for each of ≥ 1 values"
    return FieldError(f"{name} has {len(field)} bytes; expected {expected}")


def ids_array(field: bytes) -> Ids:
    """A writable int32 copy of an ids field: the wire's own is read-only and pins the reply."""
    return np.frombuffer(field, _IDS).copy()


def logprobs_array(field: bytes) -> Logprobs:
    """A writable float32 copy of a logprobs field."""
    return np.frombuffer(field, _LOGPROBS).copy()


def mask_array(field: bytes) -> Mask:
    """A writable uint8 copy of a mask field."""
    return np.frombuffer(field, np.uint8).copy()


def ids_bytes(ids: npt.ArrayLike) -> bytes:
    """Token ids as a record carries them."""
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


def logprobs_bytes(logprobs: npt.ArrayLike) -> bytes:
    """Logprobs as a record carries them."""
    return np.ascontiguousarray(logprobs, dtype="<f4").tobytes()


def mask_bytes(mask: npt.ArrayLike) -> bytes:
    """A 0/1 mask as a record carries it."""
    return np.ascontiguousarray(mask, dtype=np.uint8).tobytes()
