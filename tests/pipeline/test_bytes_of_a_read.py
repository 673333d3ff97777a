"""However large records are, a read takes no more bytes than its bound, and one record at least."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from onstream.pipeline import loop
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import encode, ids_bytes, logprobs_bytes
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Entry
from onstream.settings.record_sizes import longest_entry
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from tests.pipeline.stages import Passing, rollout, ticket

TOKENS = 1000
TOP_K = 32
BOUND = 1 << 20
SETTINGS = Settings.model_validate(
    {
        "inference": {"sampling": {"max_completion": TOKENS}},
        "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": TOP_K}},
        "deployment": {"num_teacher_gpus": 1},
    }
)


def scored(number: int, tokens: int) -> Rollout:
    """A rollout as it comes to the trainer, with `TOP_K` alternatives of each token."""
    made = rollout(ticket(number, ("train",)), tokens)
    [sample] = made.samples
    sample.teacher_logprobs = logprobs_bytes([-1.0] * tokens)
    sample.teacher_top_ids = ids_bytes(list(range(TOP_K)) * tokens)
    sample.teacher_top_logprobs = logprobs_bytes([-4.0] * TOP_K * tokens)
    sample.teacher_tail_logprobs = logprobs_bytes([-0.88] * tokens)
    return made


class Reads:
    """What each read of a worker brought, in bytes."""

    def __init__(self, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[list[int]] = []
        for name in ("read", "claim"):
            real = getattr(bus.streams, name)
            monkeypatch.setattr(bus.streams, name, self._noting(real))

    def _noting(self, real: object) -> object:
        def noted(*arguments: object, **named: object) -> list[Entry]:
            entries: list[Entry] = real(*arguments, **named)  # type: ignore[operator]
            if entries:
                self.sizes.append([len(entry.payload) for entry in entries])
            return entries

        return noted


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loop, "READ_BYTES", BOUND)
    return BOUND


def put(bus: Bus, records: Sequence[Rollout]) -> None:
    for record in records:
        bus.connection.ask(
            "XADD", bus.keys.streams["train"], "*", "n", record.number, "b", encode(record)
        )


def worker_of(bus: Bus, longest_bytes: int) -> Worker:
    return Worker(
        Passing("train"), bus, DeliverySettings(), block_s=0.01, longest_bytes=longest_bytes
    )


def read_all(worker: Worker, seen: list[int], count: int) -> None:
    while len(seen) < count:
        entries = worker.intake.take(worker.stage.room, 0.01)
        seen.extend(entry.number for entry in entries)


def test_no_read_takes_more_than_its_bound_whatever_comes_after_short_records(
    bus: Bus, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short completions of a run come first, and the longest ones unannounced."""
    draw = random.Random(3)
    lengths = [1] * 70 + [draw.randint(1, TOKENS) for _ in range(60)] + [TOKENS] * 10
    put(bus, [scored(number, tokens) for number, tokens in enumerate(lengths, start=1)])
    reads = Reads(bus, monkeypatch)
    seen: list[int] = []
    read_all(worker_of(bus, longest_entry(SETTINGS, "train")), seen, len(lengths))
    assert seen == list(range(1, len(lengths) + 1))
    assert max(sum(sizes) for sizes in reads.sizes) <= bound
    assert max(len(sizes) for sizes in reads.sizes) > 1


def test_a_record_longer_than_the_bound_comes_alone(
    bus: Bus, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bus, [scored(number, 5 * TOKENS) for number in range(1, 5)])
    reads = Reads(bus, monkeypatch)
    read_all(worker_of(bus, 6 * BOUND), [], 4)
    assert [len(sizes) for sizes in reads.sizes] == [1, 1, 1, 1]
    assert reads.sizes[0][0] > bound


def test_records_longer_than_the_settings_say_are_read_fewer_at_once(
    bus: Bus, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt may be of any length."""
    put(bus, [scored(number, TOKENS) for number in range(1, 101)])
    reads = Reads(bus, monkeypatch)
    read_all(worker_of(bus, 0), [], 100)
    first, *others = reads.sizes
    assert len(first) == loop.READ_AT_ONCE
    assert max(sum(sizes) for sizes in others) <= bound


def test_what_is_taken_again_is_bounded_too(
    bus: Bus, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bus, [scored(number, TOKENS) for number in range(1, 13)])
    bus.streams.read("train", 12)
    reads = Reads(bus, monkeypatch)
    read_all(worker_of(bus, longest_entry(SETTINGS, "train")), [], 12)
    assert len(reads.sizes) > 1
    assert max(sum(sizes) for sizes in reads.sizes) <= bound
