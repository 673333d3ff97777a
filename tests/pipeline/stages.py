"""Small stages, and records, for the tests of streams and of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample, StageName, Ticket, VersionSpan
from onstream.pipeline.stage import Delivery, Outcome, Stats


def ticket(
    number: int, route: Sequence[StageName] = ("verify", "train"), group_size: int = 4
) -> Ticket:
    """A ticket of the run's `number`."""
    group = (number - 1) // group_size
    return Ticket(
        number, group, group_size, group, seed=number, min_policy_version=0, route=list(route)
    )


def rollout(asked: Ticket, tokens: int = 16) -> Rollout:
    """A rollout of `tokens` completion tokens that answers `asked`."""
    sample = Sample(
        prompt_ids=ids_bytes(range(8)),
        completion_ids=ids_bytes(range(tokens)),
        loss_mask=mask_bytes([1] * tokens),
        generator_logprobs=logprobs_bytes([-1.0] * tokens),
        version_spans=[VersionSpan(0, 0, tokens)],
        completion_text="words",
    )
    return Rollout(
        number=asked.number,
        group=asked.group,
        group_size=asked.group_size,
        index=asked.index,
        messages=[{"role": "user", "content": "say it"}],
        info={},
        samples=[sample],
        temperature=1.0,
        finish_reason="stop",
        route=list(asked.route),
    )


class Passing:
    """A stage that passes every record on: tickets become rollouts. `before` sees the deliveries of
    each slice first.
    """

    holds_entries = False
    room = 64
    busy = False

    def __init__(
        self, name: StageName, before: Callable[[Sequence[Delivery]], None] = lambda new: None
    ) -> None:
        self.name: StageName = name
        self.before = before
        self.stats = Stats(detail="passing records on")
        self.closed: bool | None = None

    def setup(self) -> None:
        """Nothing to load."""

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Each record on its way."""
        self.before(new)
        return [Outcome(delivery, self.answer(delivery)) for delivery in new]

    def answer(self, delivery: Delivery) -> Rollout:
        """The record that goes on."""
        if isinstance(delivery.record, Ticket):
            return rollout(delivery.record)
        assert isinstance(delivery.record, Rollout)
        return delivery.record

    def close(self, *, finished: bool) -> None:
        """Remember how it ended."""
        self.closed = finished
