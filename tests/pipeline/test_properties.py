"""What holds of records and hops, whatever the numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onstream.pipeline.record_codec import (
    RecordError,
    decode_policy,
    decode_work,
    encode,
    ids_array,
    ids_bytes,
    logprobs_array,
    logprobs_bytes,
)
from onstream.pipeline.records import (
    PolicyVersion,
    Rollout,
    Sample,
    Ticket,
    Timing,
    Tombstone,
    VersionSpan,
)
from onstream.pipeline.redis.streams import HOP_BYTES, HOP_RECORDS, Move, Out, hop_batches

names = st.sampled_from(["generate", "verify", "score", "train"])
routes = st.sampled_from(
    [["train"], ["score", "train"], ["verify", "train"], ["verify", "score", "train"]]
)


ids = st.integers(0, 2**31 - 1)
logprobs = st.floats(-50, 0, width=32)


@st.composite
def drawn_samples(draw: st.DrawFn) -> Sample:
    """Samples of a few tokens; some have what a teacher says of them."""
    tokens = draw(st.integers(1, 6))
    top_k = draw(st.integers(0, 2))
    cut = draw(st.integers(0, tokens))
    version = draw(st.integers(0, 99))
    sample = Sample(
        prompt_ids=ids_bytes(draw(st.lists(ids, min_size=1, max_size=6))),
        completion_ids=ids_bytes(draw(st.lists(ids, min_size=tokens, max_size=tokens))),
        loss_mask=bytes([1, *draw(st.lists(st.integers(0, 1), min_size=tokens, max_size=tokens))])[
            :tokens
        ],
        generator_logprobs=_logprobs(draw, tokens),
        version_spans=[VersionSpan(version, 0, cut), VersionSpan(version + 1, cut, tokens)],
        completion_text=draw(st.text(max_size=20)),
    )
    if draw(st.booleans()):
        sample.teacher_logprobs = _logprobs(draw, tokens)
    if top_k:
        top_ids = st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k)
        sample.teacher_top_ids = ids_bytes(draw(top_ids))
        sample.teacher_top_logprobs = logprobs_bytes([math.log(0.9 / top_k)] * tokens * top_k)
        sample.teacher_tail_logprobs = logprobs_bytes([math.log(0.1)] * tokens)
    return sample


def _logprobs(draw: st.DrawFn, tokens: int) -> bytes:
    return logprobs_bytes(draw(st.lists(logprobs, min_size=tokens, max_size=tokens)))


samples = drawn_samples()
rollouts = st.builds(
    Rollout,
    number=st.integers(1, 2**50),
    group=st.integers(0, 2**50),
    group_size=st.integers(1, 64),
    index=st.integers(0, 2**50),
    messages=st.lists(
        st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3), max_size=3
    ),
    info=st.dictionaries(
        st.text(max_size=8),
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
        max_size=3,
    ),
    samples=st.lists(samples, min_size=1, max_size=3),
    temperature=st.floats(0.01, 4),
    finish_reason=st.sampled_from(["stop", "length"]),
    route=routes,
    timings=st.lists(
        st.builds(Timing, names, st.text(max_size=8), st.floats(0, 1e10), st.floats(0, 1e10)),
        max_size=3,
    ),
    reward=st.none() | st.floats(-10, 10),
    reward_parts=st.dictionaries(st.text(max_size=8), st.floats(-10, 10), max_size=3),
    unscored=st.none() | st.text(max_size=20),
)
tickets = st.builds(
    Ticket,
    number=st.integers(1, 2**50),
    group=st.integers(0, 2**50),
    group_size=st.integers(1, 64),
    index=st.integers(0, 2**50),
    seed=st.integers(0, 2**63 - 1),
    min_policy_version=st.integers(0, 2**31),
    route=routes,
    requeued_from=st.none() | st.integers(1, 2**50),
)
tombstones = st.builds(Tombstone, st.integers(1, 2**50), names, st.text(max_size=20))


@given(rollouts | tickets | tombstones)
def test_a_record_comes_back_as_it_was(record: Rollout | Ticket | Tombstone) -> None:
    assert decode_work(encode(record)) == record


@given(
    st.builds(
        PolicyVersion,
        st.integers(0, 2**31),
        st.text(max_size=64),
        st.text(max_size=64),
        st.integers(0, 2**50),
    )
)
def test_a_policy_version_comes_back_as_it_was(policy: PolicyVersion) -> None:
    assert decode_policy(encode(policy)) == policy
    with pytest.raises(RecordError):
        decode_work(encode(policy))


@given(tickets | tombstones, st.data())
def test_bytes_that_were_cut_or_mangled_are_refused_in_words_or_are_a_record(
    record: Ticket | Tombstone, data: st.DataObject
) -> None:
    whole = encode(record)
    at = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(RecordError):
        decode_work(whole[:at])
    mangled = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    try:
        assert isinstance(decode_work(mangled), Ticket | Rollout | Tombstone)
    except RecordError as error:
        refused = (f"{len(whole)} bytes do not decode", f"{type(record).__name__.lower()} ")
        assert str(error).startswith(refused)


@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused_in_words_or_are_a_record(payload: bytes) -> None:
    try:
        assert isinstance(decode_work(payload), Ticket | Rollout | Tombstone)
    except RecordError as error:
        assert "do not decode" in str(error)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.lists(st.floats(width=32, allow_nan=False)))
def test_arrays_come_back_as_they_were(ids: list[int], logprobs: list[float]) -> None:
    assert ids_array(ids_bytes(ids)).tolist() == ids
    assert logprobs_array(logprobs_bytes(logprobs)).tolist() == logprobs


@given(st.lists(st.integers(0, HOP_BYTES * 3 // 2), max_size=100))
def test_a_hop_is_cut_into_batches_that_keep_order_and_bounds(sizes: list[int]) -> None:
    blob = bytes(HOP_BYTES * 3 // 2)
    moves = [
        Move(str(at).encode(), [Out("train", at, memoryview(blob)[:size])])
        for at, size in enumerate(sizes)
    ]  # type: ignore[arg-type]
    batches = list(hop_batches(moves))
    assert [move for batch in batches for move in batch] == moves
    assert all(0 < len(batch) <= HOP_RECORDS for batch in batches)
    assert all(
        len(batch) == 1 or sum(move.size_bytes for move in batch) <= HOP_BYTES for batch in batches
    )
