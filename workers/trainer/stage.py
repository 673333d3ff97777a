"""The trainer: asks for rollouts, forms batches of what comes back, takes steps, publishes weights,
and answers for every number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onstream.pipeline.records import PolicyVersion, StageName, Ticket, Tombstone
from onstream.pipeline.redis.access import redis_url
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files.json_lines import JsonLines, cut
from onstream.pipeline.run_files.ownership import Ownership
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.batches.sample_rows import sample_rows
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpoint import Checkpoint
from onstream.workers.trainer.durability.checkpointing import Checkpointing, TrainerPosition
from onstream.workers.trainer.durability.disk_errors import writing_to
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.durability.resume import (
    agree_on_plan,
    become_trainer,
    lost_numbers,
    unsettled_dead,
)
from onstream.workers.trainer.evaluations import Evaluations
from onstream.workers.trainer.issuer import Issuer
from onstream.workers.trainer.publication.policy_probe import prober
from onstream.workers.trainer.publication.publisher import Publisher, student_files, transfer_of
from onstream.workers.trainer.training import Training, learner_at

log = get_logger()

READ_AHEAD = 256  # records
TICKETS_AT_ONCE = 512
READY_POLL_S = 0.05


class Trainer:
    """The stage `train`. Holds its entries: a checkpoint acknowledges what the checkpoint before it
    settled.

    Consumes rollouts and tombstones; waits for the stages of the route to be ready, then for a
    batch of settled units; is unblocked by the entry that settles the last of them; produces
    tickets, policy versions, checkpoints and metrics.
    """

    name: StageName = "train"
    holds_entries = True

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self.settings = settings
        self.bus = bus
        self.plan = make_plan(settings)
        self.run_dir = settings.run.dir / settings.run.name
        self.stats = Stats(detail="starting")
        self.max_steps = settings.trainer.max_steps
        self.issuer = _issuer(settings, self.plan.route)
        self._evaluations: Evaluations | None = None
        self._finished = False
        self._waits_for = "the stages of the route"
        self._next_poll = 0.0
        self._opened = False  # whether all stages have been ready since this trainer started

    # Start ----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Become the trainer, take up the run where its newest whole checkpoint left it, and
        publish its weights.

        Raises:
            UserError: another trainer has the run, the settings are not the run's, the student
                cannot be loaded, the disk is full.
        """
        self.files = Ownership(self.run_dir)
        self.lease = become_trainer(self.bus, self.settings.delivery.lease, self.files)
        with self.bus.lease.writing(self.lease):
            found = checkpoint.load_newest(self.run_dir / checkpoint.FOLDER)
            state = found.state if found else None
            agree_on_plan(self.bus, self.lease, self.plan, self.settings.run, self.run_dir, state)
        self._load(found)
        with self._writing():
            self.checkpointing = Checkpointing(
                self.bus, self.lease, self.run_dir, self.settings.checkpoint, state
            )
            self.acknowledgements = self.checkpointing.acknowledgements
            self.issuer = replace(
                self.issuer, requeued=self.checkpointing.requeued
            )  # one dictionary: what is asked for anew is checkpointed
            self.requests = OperatorRequestHandler(
                self.bus, self.lease, self.run_dir, self.acknowledgements, self.issuer
            )
            self._open_files()
            files = student_files(self.run_dir, self.learner)
            self.publisher = Publisher(
                self.bus,
                self.lease,
                self.settings,
                files,
                transfer_of(self.bus, self.lease, self.settings),
            )
            self._prober = prober(self.learner, self.settings.inference)
            self.policy = self._publish(self.step)
            self.recording = Recording(
                self.settings, found, self.policy.digest, self.bus.images.read
            )
        if self.settings.eval.interval:
            self._evaluations = Evaluations(self.settings, redis_url(self.settings), self.run_dir)
        self.issued = state.issued if state else 0
        self._recover()
        self.requests.look(self.step + 1)  # a run that has ended is taken up for its purges alone
        if self.step < self.max_steps and self.bus.state.finished():
            self.bus.lease.reopen(self.lease)
        self._free_since = self._stepped_at = time.monotonic()

    def _load(self, found: Checkpoint | None) -> None:
        self.learner = learner_at(self.settings, found)
        state = found.state if found else None
        step, dropped = (state.step, state.dropped) if state else (0, {})
        self.training = Training(
            self.settings,
            self.learner,
            worker=self.bus.consumer,
            step=step,
            dropped=dropped,
            images=self.bus.images.read,
        )
        if found:
            log.info(
                "resuming", checkpoint=str(found.path), step=self.step, issued=found.state.issued
            )

    @property
    def step(self) -> int:
        """How many steps are taken."""
        return self.training.step

    def _open_files(self) -> None:
        """Cut what tells of steps past the checkpoint off the run's files, and open them."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if gone := cut(self.run_dir / name, lambda row: bool(row["step"] <= self.step)):
                log.info("lines past the checkpoint cut off", file=name, lines=gone)
        self.metrics, self.samples = (
            JsonLines(self.run_dir / "metrics.jsonl"),
            JsonLines(self.run_dir / "samples.jsonl"),
        )

    def _recover(self) -> None:
        """Compare what Redis has with what it should have: settle what died unnoticed, and ask
        again for what is lost.

        At the start, and whenever Redis may have lost data under a trainer at work: then it is what
        the trainer remembers that counts.
        """
        self.bus.lease.may_have_lost_data = False
        if (known := self.bus.state.issued()) < self.issued:
            log.error(
                "redis lost data: it counts fewer tickets than were issued",
                redis=known,
                issued=self.issued,
            )
        self.issued = self.bus.lease.set_issued(self.lease, self.issued)
        self.bus.lease.write_plan(self.lease, self.plan.encode())
        with self._writing():
            self.publisher.restore(self.policy, self.learner.published_state)
        self.requests.take_up_requeued()
        for number in unsettled_dead(self.bus, self.acknowledgements.known(), self.run_dir):
            self.acknowledgements.take_without_entry(number)
            self.training.take(
                Tombstone(number, "train", "found among the dead letters"), time.time()
            )
        lost = lost_numbers(self.bus, self.acknowledgements.known(), self.issued, self.run_dir)
        if lost:
            log.error(
                "rollouts got lost with redis's data; issuing them again",
                count=len(lost),
                numbers=lost.ranges()[:20],
            )
        self._again = self.issuer.again(lost, version=self.step)
        self.bus.images.release(
            self.lease, self.acknowledgements.settled_for_good(self.bus.images.holding_numbers())
        )
        if self._evaluations:
            self._evaluations.ask_again(self.step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Change files of the run meanwhile.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full.
        """
        with self.bus.lease.writing(self.lease), writing_to(self.run_dir):
            yield

    # Work -----------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Nothing more while a batch waits or the run has ended; nor while nothing is under way
        that could come.
        """
        under_way = self.issued > len(self.acknowledgements.settled)
        return READ_AHEAD if under_way and self.training.batch is None and not self._finished else 0

    @property
    def busy(self) -> bool:
        """Whether a batch waits to be trained."""
        return self.training.batch is not None and not self.checkpointing.stalled

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Book `new`, take at most one step, ask for more, and checkpoint where due. Returns no
        outcomes: entries are held.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        if self.bus.lease.may_have_lost_data:
            log.warning(
                "redis was restarted, replaced or emptied; looking what it has lost",
                step=self.step,
                issued=self.issued,
            )
            self._recover()
        for delivery in new:
            if not isinstance(delivery.record, Ticket) and self.acknowledgements.take(delivery):
                self.training.take(delivery.record, delivery.taken)
        self._advance()
        if self.busy:
            self._train()
            self._advance()
        if self.publisher.wanted:
            with self._writing():
                self.publisher.supply()
        self.requests.look(self.step + 1)
        self._issue()
        if self.checkpointing.due(self.step, self.max_steps, full=self.bus.lease.full):
            self._checkpoint()
        self.checkpointing.acknowledge()
        if (
            self.step >= self.max_steps
            and not self._finished
            and self.checkpointing.saved(self.step)
        ):
            self.bus.lease.finish(self.lease)
            self._finished = True
        self._tell()
        return []

    def close(self, *, finished: bool) -> None:
        """Checkpoint what is not durable yet, and close the files. Entries stay pending for the
        next trainer.
        """
        if self.checkpointing.unsaved(self.step):
            self._checkpoint()
            self.checkpointing.acknowledge()
        self.training.close()
        self.metrics.close()
        self.samples.close()
        self.recording.close()
        self.publisher.close()
        if self._evaluations:
            self._evaluations.close()

    def _advance(self) -> None:
        with self.files.held(), writing_to(self.run_dir):
            result = self.training.advance()
            for timed in result.considered:
                self.recording.record(timed.record, timed.taken)
        self.acknowledgements.settle(result.settled)

    def _train(self) -> None:
        """One step: learn, publish, settle, and write down what happened."""
        started = time.monotonic()
        taken = self.training.take_step()
        learned_at = time.monotonic()
        with self._writing():
            self.policy = self._publish(self.step)
            published_at = time.monotonic()
            self.acknowledgements.settle(taken.settled)
            row = taken.row
            self.recording.stepped(self.step, self.policy.digest, row)
            row |= {
                "time": time.time(),
                "wait_s": started - self._free_since,
                "step_s": published_at - started,
                "publish_s": published_at - learned_at,
                "publish_bytes": self.publisher.sent.update_bytes,
                "delta_share": self.publisher.sent.changed_share,
                **(self._evaluations.arrived() if self._evaluations else {}),
            }
            if self._evaluations:
                self._evaluations.ask(self.step)
            self._write_down(row, taken.batch, learn_s=learned_at - started)

    def _publish(self, number: int) -> PolicyVersion:
        return self.publisher.publish(
            number, self.learner.published_state(), self._prober.ask() if self._prober else None
        )

    def _write_down(
        self, row: dict[str, Any], batch: Sequence[TrainableUnit], *, learn_s: float
    ) -> None:
        now = time.monotonic()
        row["tokens_per_s"] = row["tokens"] / learn_s
        row["elapsed_s"] = now - self._stepped_at
        row["rollouts_per_s"] = row["rollouts"] / row["elapsed_s"]
        self._free_since = self._stepped_at = now
        self.metrics.write(row)
        if self.step % self.settings.trainer.sample_interval == 0 or self.step == 1:
            for sample in sample_rows(batch, self.settings.run.name, self.step):
                self.samples.write(sample)
        for name in ("rollouts", "tokens", "step_s"):
            self.checkpointing.totals[name] = self.checkpointing.totals.get(name, 0) + row[name]
        self.stats.done += int(row["rollouts"])
        self.stats.dead += int(row["dead"])

    # Tickets --------------------------------------------------------------------------------------

    def _issue(self) -> None:
        """Issue what was lost, then what the window has room for, once the stages of the route are
        ready.
        """
        tickets = self.issuer.due(
            version=self.step,
            issued=self.issued,
            outstanding=self.issued - len(self.acknowledgements.settled),
        )
        if (tickets or self._again) and self._stages_ready():
            self._issue_again()
            taken = self.requests.issue(
                tickets, self.issued, self.settings.orchestrator.max_backlog
            )
            self.issued += taken
            self._issue_new(tickets[taken:])

    def _issue_again(self) -> None:
        while self._again:
            some = self._again[:TICKETS_AT_ONCE]
            if not self.bus.lease.reissue(self.lease, f"{self.lease.epoch}/{some[0].number}", some):
                self._waits_for = "room in Redis for tickets that got lost"
                return
            self._again = self._again[TICKETS_AT_ONCE:]

    def _issue_new(self, tickets: Sequence[Ticket]) -> None:
        at_once = max(1, TICKETS_AT_ONCE // self.issuer.group_size) * self.issuer.group_size
        for at in range(0, len(tickets), at_once):
            some = tickets[at : at + at_once]
            if not self.bus.lease.issue(
                self.lease, self.issued, some, self.settings.orchestrator.max_backlog
            ):
                self._waits_for = f"room for tickets: {'Redis is full' if self.bus.lease.full else 'the backlog is at orchestrator.max_backlog'}"
                return
            self.issued += len(some)

    def _stages_ready(self) -> bool:
        """Whether every stage of the route has been ready once; asked now and then until it is so."""
        if self._waits_for and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + READY_POLL_S
            ready = {*self.bus.state.ready_stages(), self.name}
            missing = [stage for stage in self.plan.streams if stage not in ready]
            self._waits_for = f"{', '.join(missing)}: not ready yet" if missing else ""
            if (
                not missing and not self._opened
            ):  # start-up is neither training nor waiting for data
                self._opened = True
                self._free_since = time.monotonic()
                self._stepped_at = time.monotonic()
        return not self._waits_for

    # Checkpoints ----------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        started = time.monotonic()
        with self._writing():
            self.metrics.sync()
            self.samples.sync()
            self.recording.sync()
        now = TrainerPosition(
            self.step,
            self.policy,
            self.issued,
            dict(self.training.dropped),
            self.recording.position,
        )
        if self.checkpointing.save(now, self._write_files):
            with self._writing():
                self.requests.durable()
                self.requests.spill(self.settings.delivery.max_dead)
            log.info("checkpoint", step=self.step, seconds=round(time.monotonic() - started, 3))
        self._free_since = time.monotonic()

    def _write_files(self, directory: Path) -> None:
        self.learner.save_checkpoint(directory)
        torch.save(self.learner.state(), directory / checkpoint.OPTIMIZER)

    def _tell(self) -> None:
        """Put into the heartbeat what the trainer does or waits for."""
        missing = self.training.batches.missing()
        if self._finished:
            detail = f"finished after step {self.step}"
        elif self._waits_for:
            detail = f"waits for {self._waits_for}"
        elif self.checkpointing.stalled:
            detail = "waits for a checkpoint: none could be written, see the log"
        else:
            detail = f"step {self.step + 1} of {self.max_steps}; {sum(missing.values())} rollouts of {len(missing)} open groups to come"
            detail += self._fruitless()
        self.stats.detail = detail
        self.stats.numbers = {
            "step": self.step,
            "issued": self.issued,
            "outstanding": self.issued - len(self.acknowledgements.settled),
            "unacked_bytes": self.acknowledgements.unacked_bytes,
        }

    def _fruitless(self) -> str:
        """What to add where a batch's worth of completions came since the last step and none was
        right enough to be trained on.
        """
        wrong = self.training.dropped["not_verified"]
        verified = self.training.batches.least_reward is not None
        if (
            not verified
            or self.training.batches.complete_units
            or wrong < self.settings.orchestrator.batch_size
        ):
            return ""
        return f'; none of the {wrong} completions since the last step was right, and keep = "verified" trains on no others'


def _issuer(settings: Settings, route: tuple[StageName, ...]) -> Issuer:
    orchestrator = settings.orchestrator
    return Issuer(
        seed=settings.run.seed,
        group_size=orchestrator.group_size,
        batch_size=orchestrator.batch_size,
        max_off_policy_steps=orchestrator.max_off_policy_steps,
        max_steps=settings.trainer.max_steps,
        route=route,
    )
