"""The bounds of the fields of records, and the checks of those that are arrays.

What a bound of a number or text can say is said by its type, and msgspec checks it as it decodes.
What is in bytes, or lies between two fields, is checked by the functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from onstream.settings.stages import STAGE_NAMES, StageName

MOST: Final = 2**53 - 1
"""The greatest whole number that a record may hold: JSON and Lua keep it exactly."""
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
ImageDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Route = Annotated[list[StageName], Meta(min_length=1, max_length=len(STAGE_NAMES))]

REASON_CHARACTERS: Final = 4000
"""What is kept of a reason when it is written; far under the bound of its type."""

_ROUTES: Final = frozenset(
    (*stages, STAGE_NAMES[-1])
    for count in range(len(STAGE_NAMES))
    for stages in combinations(STAGE_NAMES[:-1], count)
)
_LOGPROBS: Final = np.dtype("<f4")
_IDS: Final = np.dtype("<u4")  # an id below 0 is one of 2³¹ or more so
_LONG_BYTES: Final = 6000
_json = msgspec.json.Encoder()


class FieldError(ValueError):
    """A field of a record is out of its bounds; the message says which, and what was expected."""


def read_number(field: bytes) -> int:
    """The number in the field `n` of a stream entry; 0 where it is none that could be issued."""
    if len(field) > len(str(MOST)) or not field.isdigit():
        return 0
    number = int(field)
    return number if number <= MOST else 0


def check_route(route: Sequence[StageName]) -> None:
    """Raise FieldError unless `route` ends at the trainer, and names each stage once, in order."""
    if tuple(route) not in _ROUTES:
        raise FieldError(
            f"the route is {' → '.join(route)}; "
            f"expected stages in the order of the flow, with {STAGE_NAMES[-1]!r} as the last"
        )


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
    values = np.frombuffer(ids, _IDS)
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
