"""What both generators, the student's and that of chat endpoints, do with tickets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from onstream.pipeline.prompts import Prompt
from onstream.pipeline.records import FinishReason, Rollout, Sample, StageName, Ticket
from onstream.pipeline.redis.image_store import ImageHold, ImageStore
from onstream.pipeline.stage import Delivery, Outcome
from onstream.pipeline.tasks import Problem

STAGE: StageName = "generate"
Prepared = TypeVar("Prepared")


def split_unusable(
    deliveries: Iterable[Delivery],
    prepare: Callable[[int], Prepared],
    errors: tuple[type[Exception], ...],
) -> tuple[list[tuple[Delivery, Prepared]], list[Outcome]]:
    """The tickets whose problem can be prepared, with the result, and dead letters for the others.

    A problem that fails is not prepared again for the rest of its group: an image may take long to
    be given up.

    Args:
        deliveries: tickets.
        prepare: called with the index of a problem.
        errors: what `prepare` raises for a problem that cannot be used.
    """
    usable = []
    dead = []
    reasons = dict[int, str]()
    for delivery in deliveries:
        index = delivery.ticket.index
        if index not in reasons:
            try:
                usable.append((delivery, prepare(index)))
                continue
            except errors as error:
                reasons[index] = f"problem {index} cannot be asked: {error}"
        dead.append(Outcome(delivery, dead=reasons[index]))
    return usable, dead


class ImagesToHold:
    """The images of rollouts that are about to move on; Redis gets them before that.

    `patience_s` is how long to wait for a full Redis.
    """

    def __init__(self, store: ImageStore, patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._holds: list[ImageHold] = []

    def add(self, delivery: Delivery, prompt: Prompt) -> None:
        """Note the images of `prompt`, which the rollout from `delivery` names."""
        if prompt.images:
            self._holds.append(ImageHold(delivery.entry_id, delivery.number, prompt.files))

    def hold(self) -> None:
        """Put them into Redis, until their numbers have settled.

        Raises:
            ImagesFull: Redis stayed full.
        """
        if self._holds:
            self._store.hold(STAGE, self._holds, patience_s=self._patience_s)
            self._holds.clear()


def rollout_of(
    ticket: Ticket,
    problem: Problem,
    prompt: Prompt,
    samples: Sequence[Sample],
    *,
    temperature: float,
    finish_reason: FinishReason,
) -> Rollout:
    """The rollout that answers `ticket`."""
    return Rollout(
        number=ticket.number,
        group=ticket.group,
        group_size=ticket.group_size,
        index=ticket.index,
        messages=prompt.messages,
        info=problem.info,
        samples=list(samples),
        temperature=temperature,
        finish_reason=finish_reason,
        route=list(ticket.route),
    )
