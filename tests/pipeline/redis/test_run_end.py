"""When a run has ended, for who was there before it was resumed and for who came later."""

from __future__ import annotations

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.run_end import RunEnd


def ended_at(bus: Bus, step: int) -> Lease:
    """A run that its trainer has ended after `step` steps."""
    lease = bus.lease.acquire(30)
    bus.lease.announce(lease, PolicyVersion(step, f"digest {step}", "policies/x", 1))
    bus.lease.finish(lease)
    return lease


def test_a_run_that_goes_on_has_not_ended_until_its_trainer_says_so_once_more(bus: Bus) -> None:
    earlier = ended_at(bus, 80)
    end = RunEnd(bus.state, max_steps=100)
    assert not end.reached()
    bus.lease.reopen(earlier)
    assert not end.reached()
    bus.lease.release(earlier)
    ended_at(bus, 100)
    assert end.reached()


def test_an_end_with_all_the_steps_counts_at_once(bus: Bus) -> None:
    ended_at(bus, 80)
    assert RunEnd(bus.state, max_steps=80).reached()
    assert RunEnd(bus.state, max_steps=40).reached()
    assert RunEnd(bus.state).reached()


def test_an_end_that_comes_after_the_first_look_counts_whatever_its_step(bus: Bus) -> None:
    end = RunEnd(bus.state, max_steps=100)
    assert not end.reached()
    ended_at(bus, 80)
    assert end.reached()


def test_a_trainer_that_ends_the_run_again_without_more_steps_ends_it_for_all(bus: Bus) -> None:
    earlier = ended_at(bus, 80)
    end = RunEnd(bus.state, max_steps=100)
    assert not end.reached()
    bus.lease.release(earlier)
    ended_at(bus, 80)
    assert end.reached()
