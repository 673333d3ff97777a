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
GREATEST_LOGPROB: Final = 1e-3
"""In nats. No logprob is above 0, but for the rounding of the program that computed it."""
LEAST_LOGPROB: Final = -1e4
"""In nats. No model gives a token less: a smaller value is a mistake."""
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
_IDS: Final = np.dtype("<u4")  # an id below 0 is one of 2³¹ or more so
_LOGPROBS: Final = np.dtype("<f4")
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


def check_ids(name: str, field: bytes, count: int | None = None) -> None:
    """Raise FieldError unless `field` is `count` token ids (None: one or more) below 2³¹."""
    _check_length(name, field, count)
    ids = np.frombuffer(field, _IDS)
    if ids[ids.argmax()] >= 1 << 31:
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
    _check_length(name, field, count)
    least, most = _range(np.frombuffer(field, _LOGPROBS))
    # Written so that NaN, which is both the least and the most, is refused too.
    if not (least >= LEAST_LOGPROB and most <= GREATEST_LOGPROB):
        raise FieldError(
            f"{name} has the values {least:g} to {most:g}; expected {LEAST_LOGPROB:g} to 0, in nats"
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
    least, most = _range(sums)
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


def _check_length(name: str, field: bytes, count: int | None) -> None:
    if count is None:
        if not field or len(field) % 4:
            raise FieldError(f"{name} has {len(field)} bytes; expected 4 for each of ≥ 1 values")
    elif len(field) != 4 * count:
        raise FieldError(
            f"{name} has {len(field)} bytes; expected {4 * count}: 4 for each of {count} values"
        )


def _range(values: Logprobs) -> tuple[np.float32, np.float32]:
    """The least and the greatest of `values`; `argmin` takes half the time of `min`."""
    return values[values.argmin()], values[values.argmax()]
