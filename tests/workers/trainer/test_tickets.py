"""The window of tickets."""

from dataclasses import replace

from onstream.pipeline.records import Ticket
from onstream.workers.trainer.tickets import TicketPlanner, sampling_seed

PLANNER = TicketPlanner(
    seed=3,
    group_size=4,
    batch_size=8,
    max_off_policy_steps=2,
    max_steps=100,
    route=("verify", "train"),
)


def test_a_ticket_says_all_that_its_rollout_needs() -> None:
    assert PLANNER.ticket(6, 0) == Ticket(
        number=6,
        group=1,
        group_size=4,
        index=1,
        seed=sampling_seed(3, 6),
        min_policy_version=0,
        route=["verify", "train"],
    )


def test_the_window_holds_one_batch_more_than_the_steps_allowed_off_policy() -> None:
    tickets = PLANNER.due(version=0, issued=0, outstanding=0)
    assert [ticket.number for ticket in tickets] == list(range(1, 25))
    assert PLANNER.due(version=0, issued=24, outstanding=24) == []


def test_a_trained_batch_opens_the_window_by_one_batch() -> None:
    tickets = PLANNER.due(version=1, issued=24, outstanding=16)
    assert [ticket.number for ticket in tickets] == list(range(25, 33))
    assert {ticket.group for ticket in tickets} == {6, 7}


def test_a_ticket_far_ahead_needs_a_newer_policy_to_be_fresh_when_its_turn_comes() -> None:
    tickets = PLANNER.due(version=5, issued=100, outstanding=0)
    assert [ticket.min_policy_version for ticket in tickets[::4]] == [3, 3, 4, 4, 5, 5]


def test_with_no_step_off_policy_every_ticket_needs_the_current_version() -> None:
    exact = replace(PLANNER, max_off_policy_steps=0)
    tickets = exact.due(version=7, issued=56, outstanding=0)
    assert len(tickets) == 8
    assert {ticket.min_policy_version for ticket in tickets} == {7}


def test_no_ticket_waits_for_a_version_that_only_itself_could_bring() -> None:
    exact = replace(PLANNER, max_off_policy_steps=0)
    tickets = exact.due(version=7, issued=64, outstanding=7)  # one of eight single rollouts died
    assert len(tickets) == 4
    assert {ticket.min_policy_version for ticket in tickets} == {7}


def test_nothing_is_asked_for_that_no_step_would_train() -> None:
    assert len(PLANNER.due(version=98, issued=800, outstanding=8)) == 8
    assert PLANNER.due(version=99, issued=800, outstanding=8) == []
    assert PLANNER.due(version=100, issued=800, outstanding=0) == []


def test_a_trainer_that_fell_back_issues_nothing_until_it_caught_up() -> None:
    assert PLANNER.due(version=3, issued=80, outstanding=56) == []


def test_a_lost_number_is_issued_again_as_it_was() -> None:
    first = PLANNER.due(version=0, issued=0, outstanding=0)[5]
    again = PLANNER.again([6], version=4)
    assert again == [Ticket(first.number, first.group, 4, first.index, first.seed, 2, first.route)]


def test_seeds_differ_by_number_and_by_run() -> None:
    seeds = {sampling_seed(run, number) for run in range(3) for number in range(1, 200)}
    assert len(seeds) == 3 * 199
    assert all(0 <= seed < 2**63 for seed in seeds)
