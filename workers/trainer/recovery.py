"""Finds what Redis has lost, restores it, and reissues the numbers that went with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from onstream.pipeline.records import PolicyVersion, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import dead_numbers
from onstream.pipeline.redis.keys import STAGES
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.telemetry import get_logger
from onstream.settings.plan import Plan
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements, RangeSet
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.durability.run_directory import RunDirectory
from onstream.workers.trainer.evaluations import Evaluations
from onstream.workers.trainer.publication.publisher import Publisher
from onstream.workers.trainer.tickets import TicketIssuer
from onstream.workers.trainer.training import Training

log = get_logger()


@dataclass(frozen=True)
class Recovery:
    """Compares what Redis has with what it should have, and mends the difference.

    At the start, and whenever Redis may have lost data under a trainer at work: then what the
    trainer remembers counts, not the checkpoint.
    """

    bus: Bus
    lease: Lease
    plan: Plan
    directory: RunDirectory
    training: Training
    tickets: TicketIssuer
    acknowledgements: Acknowledgements
    requests: OperatorRequestHandler
    publisher: Publisher
    evaluations: Evaluations | None

    def run(self, policy: PolicyVersion) -> None:
        """Mend what is lost; `policy` is the newest version.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, or Redis has no room for the weights.
        """
        # First of all: what gets lost from here on is noticed by the next call.
        self.bus.lease.may_have_lost_data = False
        self._restore_redis(policy)
        self._settle_unsettled_dead()
        self._reissue_lost_numbers()
        self._release_images()
        if self.evaluations:
            self.evaluations.request_again(self.training.step)

    def _restore_redis(self, policy: PolicyVersion) -> None:
        """Give Redis the count of tickets, the plan, the newest policy and the requeued numbers."""
        self.tickets.restore_count()
        self.bus.lease.write_plan(self.lease, self.plan.encode())
        with self.directory.changing():
            self.publisher.restore(policy, self.training.learner.live_state)
        self.requests.restore_requeued()

    def _settle_unsettled_dead(self) -> None:
        """Let dead letters count whose tombstones went with a checkpoint that was lost."""
        known = self.acknowledgements.known()
        for number in _unsettled_dead(self.bus, known, self.directory.path):
            self.acknowledgements.take_without_entry(number)
            tombstone = Tombstone(number, "train", "found among the dead letters")
            self.training.take(tombstone, time.time())

    def _reissue_lost_numbers(self) -> None:
        known = self.acknowledgements.known()
        lost = _lost_numbers(self.bus, known, self.tickets.issued, self.directory.path)
        if lost:
            log.error(
                "rollouts got lost with redis's data or the run's journal; issuing them again",
                count=len(lost),
                numbers=lost.ranges()[:20],
            )
        self.tickets.reissue(lost, self.training.step)

    def _release_images(self) -> None:
        """Let go of images that numbers hold which no trainer will look at again."""
        held = self.bus.images.holding_numbers()
        self.bus.images.release(self.lease, self.acknowledgements.settled_for_good(held))


def _lost_numbers(bus: Bus, known: RangeSet, issued: int, run_dir: Path) -> RangeSet:
    """The numbers up to `issued` that are neither `known` nor in any stream or dead letter.

    `known` are those that have settled or are in the trainer's hands.
    """
    known = known.copy()
    for number in bus.state.numbers_of_episodes():
        known.add(number)
    # In the order of the flow: a record that moves meanwhile is met at least once.
    for stage in STAGES:
        for number in bus.state.numbers(stage):
            known.add(number)
    for number in dead_numbers(bus, run_dir):
        known.add(number)
    return RangeSet.of(known.missing(issued))


def _unsettled_dead(bus: Bus, known: RangeSet, run_dir: Path) -> list[int]:
    """Numbers of dead letters whose tombstones are gone, and that have not settled.

    Their tombstones were acknowledged by a checkpoint that was lost since.
    """
    # Dead letters before streams: who dies in between has its tombstone in the streams.
    dead = {number for number in dead_numbers(bus, run_dir) if number > 0 and number not in known}
    return sorted(dead.difference(*(bus.state.numbers(stage) for stage in STAGES))) if dead else []
