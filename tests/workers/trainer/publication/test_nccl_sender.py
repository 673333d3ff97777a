"""The trainer and generators in other processes agree on transfers over a real Redis; what NCCL
itself does needs GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.pipeline.weights import LoadedPolicy, WeightsError, announced
from onstream.pipeline.weights.nccl_transfer import PolicyHeader, TransferCoordinator
from onstream.workers.generator.nccl_receiver import READING, REGISTER_S, TransferReceiver
from onstream.workers.trainer.publication.nccl_sender import NcclTransfer, RedisSyncClient
from tests.forkserver import context
from tests.waiting import LONGEST_S
from tests.workers.trainer.receivers import SaysSo, start

PATIENCE_S = 4.0
INFO = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "packed": True}


class NoBroadcast:
    """Drives the client as vLLM's trainer side does, and sends nothing."""

    def __init__(self, client: RedisSyncClient, address: str, size: int) -> None:
        self._client = client
        self.closed = False
        client.init_weight_transfer_engine({**INFO, "master_address": address, "world_size": size})

    def send_weights(self) -> None:
        self._client.start_weight_update()
        self._client.update_weights({"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]]})
        self._client.finish_weight_update()

    def shutdown(self) -> None:
        self.closed = True


class Generators:
    """The processes, and the ranks that they were told."""

    def __init__(self, url: str, bus: Bus) -> None:
        self._url = url
        self._bus = bus
        self.joined = context().Queue()
        self.processes: dict[str, BaseProcess] = {}

    def start(self, name: str, gpus: int = 1, ends: tuple[str, ...] = ()) -> None:
        self.processes[name] = start(self._url, self._bus, name, gpus, ends, self.joined)

    def ranks(self, count: int) -> dict[str, int]:
        return dict(self.joined.get(timeout=LONGEST_S) for _ in range(count))

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].join()


def policy(number: int, name: str = "w") -> LoadedPolicy:
    return LoadedPolicy.of(number, {name: torch.full((2,), float(number))})


@pytest.fixture
def generators(redis_url: str, bus: Bus) -> Iterator[Generators]:
    generators = Generators(redis_url, bus)
    yield generators
    for name in generators.processes:
        generators.kill(name)


@pytest.fixture
def opened() -> list[NoBroadcast]:
    return []


@pytest.fixture
def transfer(bus: Bus, opened: list[NoBroadcast]) -> NcclTransfer:
    def opens(client: RedisSyncClient, address: str, size: int) -> NoBroadcast:
        opened.append(NoBroadcast(client, address, size))
        return opened[-1]

    return NcclTransfer(
        TransferCoordinator(bus.transfer, bus.lease.acquire(60), PATIENCE_S),
        "127.0.0.1",
        PATIENCE_S,
        opens,
    )


def test_all_join_once_each_with_ranks_for_its_gpus_and_hold_every_version(
    generators: Generators, transfer: NcclTransfer, opened: list[NoBroadcast]
) -> None:
    generators.start("a", gpus=2)
    generators.start("b", gpus=1)
    assert transfer.send(policy(1))
    assert transfer.send(policy(2))
    assert generators.ranks(2) == {"a": 1, "b": 3}
    assert len(opened) == 1


def test_without_a_generator_that_receives_nothing_is_sent(
    transfer: NcclTransfer, opened: list[NoBroadcast]
) -> None:
    assert not transfer.send(policy(1))
    assert not opened


def test_a_newcomer_is_taken_into_a_new_group(
    generators: Generators, transfer: NcclTransfer, opened: list[NoBroadcast]
) -> None:
    generators.start("b")
    assert transfer.send(policy(1))
    assert generators.ranks(1) == {"b": 1}
    generators.start("a", gpus=4)
    assert transfer.send(policy(2))
    assert generators.ranks(2) == {"a": 1, "b": 5}
    assert [group.closed for group in opened] == [True, False]


@pytest.mark.parametrize("at", ["join", "receive"])
def test_a_generator_that_cannot_makes_the_transfer_fail_and_the_next_one_begins_anew(
    generators: Generators, transfer: NcclTransfer, opened: list[NoBroadcast], at: str
) -> None:
    generators.start(
        "a",
        ends=("no route to the trainer",) if at == "join" else ("ready", "no route to the trainer"),
    )
    generators.start("b")
    assert not transfer.send(policy(1))
    assert transfer.send(policy(2))
    assert [group.closed for group in opened] == ([False] if at == "join" else [True, False])


def test_a_generator_that_is_killed_costs_one_patience_and_then_the_others_go_on(
    generators: Generators, transfer: NcclTransfer, bus: Bus, opened: list[NoBroadcast]
) -> None:
    generators.start("a")
    generators.start("b")
    assert transfer.send(policy(1))
    generators.ranks(2)
    generators.kill("a")
    assert not transfer.send(policy(2))
    assert opened[0].closed
    bus.connection.client.hdel(bus.keys.workers, "a")  # as its heartbeat ages
    assert transfer.send(policy(3))
    assert generators.ranks(1) == {"b": 1}


class Here:
    """A receiver in this process, which the test moves on, and calls to it."""

    def __init__(self, bus: Bus, *ends: str) -> None:
        self.bus = bus
        self.now = 0.0
        self.calls = 0
        bus.state.write_heartbeat("generate", Stats())
        self.lease = bus.lease.acquire(60)
        self.engine = SaysSo(1, ends)
        self.receiver = TransferReceiver(
            bus.transfer, self.engine, PATIENCE_S, clock=lambda: self.now
        )

    def call(self, sent: LoadedPolicy) -> Callable[[], None]:
        """Ask for `sent`; the receiver looks twice; returns what waits for the answer."""
        caller = TransferCoordinator(self.bus.transfer, self.lease, patience_s=0)
        with pytest.raises(WeightsError, match="tester did not answer"):
            caller.call("receive", {"tester": 1}, update_info(), PolicyHeader.of(sent))
        return self.receiver.look


def update_info() -> dict[str, Any]:
    return {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]]}


def test_what_was_received_is_held_until_it_is_loaded(bus: Bus) -> None:
    here = Here(bus)
    sent = policy(3)
    look = here.call(sent)
    assert not here.receiver.has(announced(sent))
    look()
    assert here.receiver.has(announced(sent))
    here.receiver.load(announced(sent))
    assert here.engine.loaded == [(3, sent.digest)]
    assert not here.receiver.has(announced(sent))


def test_a_transfer_that_hangs_is_given_up_and_the_group_left(bus: Bus) -> None:
    here = Here(bus, READING)
    sent = policy(3)
    look = here.call(sent)
    look()
    assert "onstream_leave" not in here.engine.asked
    here.now = PATIENCE_S + 1
    look()
    assert here.engine.asked[-1] == "onstream_leave"
    assert not here.receiver.has(announced(sent))


def test_another_models_weights_are_refused_before_they_are_received(bus: Bus) -> None:
    here = Here(bus)
    here.call(policy(3, "v"))()
    assert here.engine.asked == []
    assert not here.receiver.has(announced(policy(3, "v")))


def test_receivers_that_redis_forgot_register_again(bus: Bus) -> None:
    here = Here(bus)
    bus.connection.client.delete(bus.keys.receivers)
    here.receiver.look()
    assert bus.transfer.receivers() == {}
    here.now = REGISTER_S
    here.receiver.look()
    assert bus.transfer.receivers() == {"tester": 1}


def test_a_generator_answers_no_call_from_before_it_started(bus: Bus) -> None:
    first = Here(bus)
    first.call(policy(3))
    second = SaysSo(1)
    TransferReceiver(bus.transfer, second, PATIENCE_S).look()
    assert second.asked == []
