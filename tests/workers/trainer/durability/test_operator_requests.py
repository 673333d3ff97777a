"""What operators ask of the trainer: requeued rollouts, purged letters; and letters that spill."""

from __future__ import annotations

from collections.abc import Callable

from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import Rollout, Ticket, Tombstone
from onstream.pipeline.redis.dead_letters import all_letters, dead_numbers, spilled_numbers
from onstream.pipeline.redis.streams import Move, Out
from tests.workers.trainer.driver import Run, rollout

RunMaker = Callable[..., Run]
DEAD = {3, 10}


def give_up(run: Run, numbers: set[int]) -> None:
    """A worker answers every waiting ticket, and gives up those of `numbers`."""
    policy = run.bus.state.newest_policy()
    assert policy is not None
    moves = []
    for entry, ticket in run.tickets():
        outs = [Out("train", ticket.number, encode(rollout(ticket, policy.number)))]
        if ticket.number in numbers:
            tombstone = Tombstone(ticket.number, "generate", "gave up")
            outs = [
                Out("dead", ticket.number, entry.payload, f"gave up on {ticket.number}", 4),
                Out("train", ticket.number, encode(tombstone)),
            ]
        moves.append(Move(entry.id, outs))
    run.bus.streams.move("generate", moves)


def start(run: RunMaker, **changes: object) -> Run:
    """A run of which two rollouts died and one batch is trained."""
    started = run(**changes)
    started.ready()
    started.turn()
    give_up(started, DEAD)
    started.turn(3)
    return started


def look_again(run: Run) -> None:
    """The next turn looks for requests, however short ago the last one did."""
    run.trainer.requests._next_poll = 0.0
    run.turn()


def test_a_requeue_issues_one_group_under_new_numbers_that_asks_the_same_and_names_the_dead(
    run: RunMaker,
) -> None:
    started = start(run)
    started.bus.requests.add("requeue", 3)
    look_again(started)
    policy = started.bus.state.newest_policy()
    asked: list[Ticket] = []

    def keep(ticket: Ticket, version: int) -> Rollout | Tombstone:
        asked.append(ticket)
        return rollout(ticket, version)

    started.to_the_end(keep)
    assert policy is not None
    group = [ticket for ticket in asked if ticket.index == 0]
    assert [ticket.requeued_from for ticket in group] == [3, None, None, None]
    assert group[0].number > 8
    assert list(started.bus.requests.waiting()) == []
    assert started.bus.requests.requeued() == {group[0].number: 3}
    assert started.counts()["dead"] == 2  # number 3 stays dead


def test_two_dead_of_one_group_are_requeued_in_one_new_group(run: RunMaker) -> None:
    started = run()
    started.ready()
    started.turn()
    give_up(started, {2, 3})
    started.turn(3)
    for number in (2, 3):
        started.bus.requests.add("requeue", number)
    look_again(started)
    started.answer()
    started.turn(3)
    new = started.bus.requests.requeued()
    assert sorted(new.values()) == [2, 3]
    assert len({(number - 1) // 4 for number in new}) == 1


def test_a_requeue_asked_twice_is_served_once(run: RunMaker) -> None:
    started = start(run)
    for _ in range(2):
        started.bus.requests.add("requeue", 3)
    look_again(started)
    started.to_the_end()
    started.bus.requests.add("requeue", 3)
    look_again(started)
    assert list(started.bus.requests.requeued().values()) == [3]
    assert list(started.bus.requests.waiting()) == []


def test_a_rollout_that_lives_is_not_requeued(run: RunMaker) -> None:
    started = start(run)
    started.bus.requests.add("requeue", 1)
    look_again(started)
    assert list(started.bus.requests.waiting()) == []
    started.to_the_end()
    assert started.bus.requests.requeued() == {}


def test_a_request_for_a_number_that_has_not_settled_waits_for_it(run: RunMaker) -> None:
    started = run()
    started.ready()
    started.turn()
    started.bus.requests.add("requeue", 3)
    look_again(started)
    assert len(list(started.bus.requests.waiting())) == 1
    give_up(started, {3})
    started.turn(3)
    look_again(started)
    started.to_the_end()
    assert list(started.bus.requests.requeued().values()) == [3]


def test_lost_tickets_of_a_requeue_are_issued_again_as_they_were(run: RunMaker) -> None:
    started = start(run)
    started.bus.requests.add("requeue", 3)
    look_again(started)
    started.until(4)
    started.turn()
    [(new, dead)] = started.bus.requests.requeued().items()
    assert started.checkpoints()
    started.lose_redis()
    started.bus.connection.create_groups()
    started.start()
    assert started.bus.requests.requeued() == {new: dead}
    assert started.trainer.tickets.planner.ticket(new, 0).requeued_from == 3
    assert started.trainer.tickets.planner.ticket(new + 1, 0).index == 0


def test_a_purge_deletes_the_letter_once_a_checkpoint_counts_the_number_as_purged(
    run: RunMaker,
) -> None:
    started = start(run)
    [letter] = [
        letter
        for letter in all_letters(started.bus, started.trainer.directory.path)
        if letter.number == 3
    ]
    started.bus.requests.add("purge", 3, letter.entry_id)
    look_again(started)
    assert dead_numbers(started.bus, started.trainer.directory.path) == DEAD
    started.to_the_end()
    assert dead_numbers(started.bus, started.trainer.directory.path) == {10}
    assert list(started.bus.requests.waiting()) == []
    assert started.counts() == {"issued": 48, "trained": 46, "dropped": 1, "dead": 1}


def test_a_trainer_killed_between_a_purge_and_its_checkpoint_does_it_again(run: RunMaker) -> None:
    started = start(run)
    [letter] = [
        letter
        for letter in all_letters(started.bus, started.trainer.directory.path)
        if letter.number == 3
    ]
    started.bus.requests.add("purge", 3, letter.entry_id)
    look_again(started)
    started.start()
    started.turn()
    look_again(started)
    started.to_the_end()
    assert dead_numbers(started.bus, started.trainer.directory.path) == {10}
    assert "duplicated" not in started.counts()
    assert started.counts()["dropped"] == 1


def test_dead_letters_over_the_bound_spill_at_a_checkpoint_and_the_audit_counts_them(
    run: RunMaker,
) -> None:
    started = start(run, delivery__max_dead=1)
    started.until(2)
    started.turn()
    path = started.trainer.directory.path / "dead.jsonl"
    assert started.bus.state.dead_numbers() == [10]
    assert spilled_numbers(path) == [3]
    assert started.counts()["dead"] == 2


def test_a_spilled_letter_is_purged_from_its_file(run: RunMaker) -> None:
    started = start(run, delivery__max_dead=1)
    started.until(2)
    started.turn()
    path = started.trainer.directory.path / "dead.jsonl"
    [letter] = [
        letter
        for letter in all_letters(started.bus, started.trainer.directory.path)
        if letter.number == 3
    ]
    started.bus.requests.add("purge", 3, letter.entry_id)
    look_again(started)
    started.to_the_end()
    assert spilled_numbers(path) == []
    assert started.counts()["dropped"] == 1


def test_an_entry_that_is_no_request_is_refused_and_removed(run: RunMaker) -> None:
    started = start(run)
    started.bus.connection.ask("XADD", started.bus.keys.requests, "*", "do", "explode", "n", "3")
    started.bus.connection.ask("XADD", started.bus.keys.requests, "*", "words", "none")
    look_again(started)
    assert list(started.bus.requests.waiting()) == []


def test_a_purge_of_a_run_that_has_ended_is_served_when_the_run_is_resumed(run: RunMaker) -> None:
    started = start(run)
    started.to_the_end()
    [letter] = [
        letter
        for letter in all_letters(started.bus, started.trainer.directory.path)
        if letter.number == 3
    ]
    started.bus.requests.add("purge", 3, letter.entry_id)
    started.start()
    started.trainer.close()
    assert dead_numbers(started.bus, started.trainer.directory.path) == {10}
    assert started.counts()["dropped"] == 1
