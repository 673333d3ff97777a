"""What holds of batches, acknowledgements, tickets and checkpoints, whatever comes and dies."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onstream.pipeline.records import PolicyVersion, Rollout, Tombstone
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.pipeline.stage import Delivery
from onstream.settings.root import Settings
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import TrainerState
from onstream.workers.trainer.tickets import TicketPlanner
from onstream.workers.trainer.training import Training
from tests.workers.trainer.records import rollout, tombstone

GROUP = 2
BATCH = 4
STALENESS = 1
Blow = Literal["none", "checkpoint", "death", "death and a torn checkpoint"]
POLICY = PolicyVersion(0, "digest", "policies/000000", 1)


class CountingLearner:
    """In place of a model, which has no part in who trains with whom."""

    def check(self, sample: Any) -> None:
        """Nothing is wrong with it."""

    vision = None
    prepares_ahead = False

    def step(self, samples: Sequence[Any], max_steps: int, **_: Any) -> dict[str, float]:
        """Nothing is learned."""
        return {"tokens": float(len(samples))}


@dataclass
class Trained:
    """What a stream came to: the numbers of each batch, the fate of each number, and how often each
    was settled.
    """

    batches: list[list[int]] = field(default_factory=list)
    fates: dict[int, Fate] = field(default_factory=dict)
    settled: Counter[int] = field(default_factory=Counter)


class Life:
    """A trainer from the checkpoint `state` on, as onstream.workers.trainer.startup puts its parts
    together.
    """

    def __init__(self, run: Settings, state: TrainerState | None) -> None:
        self.acknowledgements = Acknowledgements(state)
        self.new = Trained()
        self.training = Training(
            run,
            CountingLearner(),
            worker="t",
            step=state.step if state else 0,
            dropped=state.dropped if state else None,
        )  # type: ignore[arg-type]

    def settle(self, settled: Sequence[Settled]) -> None:
        """Note it, here and in the acknowledgements."""
        self.acknowledgements.settle(settled)
        self.new.fates.update({line.number: line.fate for line in settled})
        self.new.settled.update(line.number for line in settled)

    def handle(self, new: Sequence[Delivery]) -> None:
        """One slice of work."""
        for delivery in new:
            if self.acknowledgements.take(delivery):
                self.training.take(delivery.record, 0.0)  # type: ignore[arg-type]
        self.settle(self.training.advance().settled)
        if self.training.batch is not None:
            step = self.training.take_step()
            numbers = [rollout.number for unit in step.batch for rollout in unit.rollouts]
            self.new.batches.append(numbers)
            self.settle(step.settled)
            self.settle(self.training.advance().settled)

    def state(self, sequence: int) -> TrainerState:
        """What a checkpoint holds now."""
        settled = self.acknowledgements.settled.ranges()
        return TrainerState(
            sequence,
            self.training.step,
            POLICY,
            0,
            settled,
            self.acknowledgements.in_newest_checkpoint,
            0,
            {},
            dropped=dict(self.training.dropped),
        )


def settings_of_the_run() -> Settings:
    return Settings.model_validate(
        {
            "orchestrator": {
                "batch_size": BATCH,
                "group_size": GROUP,
                "max_off_policy_steps": STALENESS,
            },
            "trainer": {"max_steps": 100},
            "deployment": {"stages": ["generate", "verify", "train"]},
        }
    )


def delivered(stream: Sequence[Rollout | Tombstone], at: int) -> Delivery:
    """The entry `at`; each time with a record of its own, as decoding gives."""
    record = stream[at]
    if isinstance(record, Rollout):
        record = rollout(
            record.number, group_size=GROUP, versions=_versions(record), reward=record.reward
        )
    return Delivery(f"{at}-0".encode(), record.number, record, 10, 1, 0.0)


def _versions(record: Rollout) -> tuple[int, ...]:
    return tuple(span.version for span in record.samples[0].version_spans)


def train(
    stream: Sequence[Rollout | Tombstone], reads: Iterable[int], blows: Iterable[Blow]
) -> Trained:
    """Feed `stream` in `reads` of so many entries, and after each do what `blows` say.

    The newest checkpoint may be torn when the trainer dies: then the one before it is taken up.
    """
    run = settings_of_the_run()
    acknowledged = set[bytes]()
    at = 0
    kept: list[tuple[TrainerState | None, Trained]] = [
        (None, Trained())
    ]  # the last two checkpoints, with what had come of the stream
    life = Life(run, None)
    left = iter(blows)
    for size in (*reads, *[1] * (2 * len(stream) + 2)):
        life.handle([delivered(stream, entry) for entry in range(at, min(at + size, len(stream)))])
        at = min(at + size, len(stream))
        blow = next(left, "none")
        if blow == "checkpoint":
            before, durable = kept[-1]
            kept = [
                kept[-1],
                (life.state(before.sequence + 1 if before else 1), _together(durable, life.new)),
            ]
            life.acknowledgements.checkpoint_begins()
            life.acknowledgements.checkpoint_is_durable()
            ids = life.acknowledgements.releasable()
            assert all(
                stream[int(entry.split(b"-")[0])].number in life.acknowledgements.settled
                for entry in ids
            )
            acknowledged |= set(ids)
            life.acknowledgements.released(ids)
            life.new = Trained()
        elif blow != "none":
            if blow == "death and a torn checkpoint":
                kept = kept[:1]
            life = Life(run, kept[-1][0])
            life.handle(
                [
                    delivered(stream, entry)
                    for entry in range(at)
                    if f"{entry}-0".encode() not in acknowledged
                ]
            )
    return _together(kept[-1][1], life.new)


def _together(before: Trained, after: Trained) -> Trained:
    return Trained(
        [*before.batches, *after.batches],
        {**before.fates, **after.fates},
        before.settled + after.settled,
    )


records = st.tuples(
    st.sampled_from(["live", "live", "live", "unscored", "dead"]), st.integers(0, 4)
)
streams = st.integers(1, 10).flatmap(
    lambda groups: st.tuples(
        st.lists(records, min_size=groups * GROUP, max_size=groups * GROUP),
        st.permutations(range(1, groups * GROUP + 1)),
        st.lists(st.integers(0, groups * GROUP - 1), max_size=4),
    )
)


def stream_of(
    drawn: tuple[list[tuple[str, int]], list[int], list[int]],
) -> list[Rollout | Tombstone]:
    """Records of all numbers in some order, some of which come again, as they do when they were
    issued again.
    """
    kinds, order, again = drawn
    made: list[Rollout | Tombstone] = []
    for number in order:
        kind, version = kinds[number - 1]
        reward = None if kind == "unscored" else 1.0
        made.append(
            tombstone(number)
            if kind == "dead"
            else rollout(number, group_size=GROUP, versions=(version,), reward=reward)
        )
    return made + [made[at] for at in again]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    streams,
    st.lists(st.integers(0, 7), max_size=20),
    st.lists(st.sampled_from(get_args(Blow)), max_size=20),
)
def test_batches_are_a_function_of_the_stream_alone(
    drawn: tuple[list[tuple[str, int]], list[int], list[int]], reads: list[int], blows: list[Blow]
) -> None:
    stream = stream_of(drawn)
    undisturbed = train(stream, [len(stream)], [])
    disturbed = train(stream, reads, blows)
    assert disturbed.batches == undisturbed.batches
    assert disturbed.fates == undisturbed.fates
    assert set(disturbed.settled.values()) <= {1}, "settled twice"
    trained = [number for batch in undisturbed.batches for number in batch]
    assert len(trained) == len(set(trained))
    assert {number for number, fate in undisturbed.fates.items() if fate == "trained"} == set(
        trained
    )


@given(streams)
def test_no_batch_holds_a_group_that_is_too_stale_and_dropped_ones_were(
    drawn: tuple[list[tuple[str, int]], list[int], list[int]],
) -> None:
    stream = stream_of(drawn)
    versions = {
        record.number: _versions(record)[0] for record in stream if isinstance(record, Rollout)
    }
    found = train(stream, [len(stream)], [])
    for step, batch in enumerate(found.batches):
        assert all(step - versions[number] <= STALENESS for number in batch)
        groups = [(number - 1) // GROUP for number in batch]
        assert len(set(groups)) == BATCH // GROUP
    for number, fate in found.fates.items():
        group = (number - 1) // GROUP
        together = [version for other, version in versions.items() if (other - 1) // GROUP == group]
        assert fate != "stale" or len(found.batches) - min(together) > STALENESS
        assert fate not in ("dead", "group_dead") or number not in versions


@given(
    version=st.integers(0, 40),
    max_steps=st.integers(1, 40),
    groups=st.integers(1, 6),
    group_size=st.integers(1, 8),
    ahead=st.integers(0, 5),
    issued=st.integers(0, 300),
    outstanding=st.integers(0, 300),
)
def test_the_window_is_filled_in_whole_groups_and_never_overfilled(
    version: int,
    max_steps: int,
    groups: int,
    group_size: int,
    ahead: int,
    issued: int,
    outstanding: int,
) -> None:
    batch = groups * group_size
    planner = TicketPlanner(
        seed=1,
        group_size=group_size,
        batch_size=batch,
        max_off_policy_steps=ahead,
        max_steps=max_steps,
        route=("train",),
    )
    issued *= group_size
    tickets = planner.due(version=version, issued=issued, outstanding=outstanding)
    window = max(0, min(1 + ahead, max_steps - version)) * batch
    assert [ticket.number for ticket in tickets] == list(
        range(issued + 1, issued + 1 + len(tickets))
    )
    assert len(tickets) % group_size == 0
    assert not tickets or window <= outstanding + len(tickets) < window + group_size
    assert tickets or outstanding >= window
    assert all(
        max(0, version - ahead) <= ticket.min_policy_version <= version for ticket in tickets
    )
    assert [ticket.min_policy_version for ticket in tickets] == sorted(
        ticket.min_policy_version for ticket in tickets
    )
    for ticket in tickets:
        assert ticket == planner.ticket(ticket.number, ticket.min_policy_version)
        assert ticket.index == planner.problem((ticket.number - 1) // group_size)


names = st.sampled_from(["model.safetensors", "config.json", checkpoint.OPTIMIZER])
files = st.dictionaries(names, st.binary(min_size=1, max_size=40), min_size=1)


@settings(max_examples=30)
@given(files, files, st.data())
def test_a_torn_checkpoint_is_found_whatever_was_torn_and_the_one_before_it_is_used(
    older: dict[str, bytes], newer: dict[str, bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for step, contents in enumerate((older, newer), 1):
            contents = {**contents, checkpoint.OPTIMIZER: b"state"}
            state = TrainerState(
                step, step, POLICY, 4 * step, {"trained": [(1, 4 * step)]}, [], 0, {}
            )

            def write(where: Path, contents: dict[str, bytes] = contents) -> None:
                for file, content in contents.items():
                    (where / file).write_bytes(content)

            checkpoint.save(directory, state, write, fence=contextlib.nullcontext)
        path = directory / "step-000002"
        assert checkpoint.damage(path) is None
        victim = path / data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
        whole = victim.read_bytes()
        torn = data.draw(
            st.binary(max_size=60)
            | st.integers(0, len(whole) - 1).map(lambda at: whole[:at])
            | st.none()
        )
        if torn is None:
            victim.unlink()
        else:
            victim.write_bytes(torn)
        if torn == whole:
            return
        assert checkpoint.damage(path) is not None
        found = checkpoint.load_newest(directory)
        assert found is not None and found.state.sequence == 1
        assert not path.exists() and (directory / "torn-step-000002").exists()
