"""A generator's end of the transport `nccl`: it answers the trainer's calls, and has its engine's
processes do what they ask.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import msgspec

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.transfer_state import TransferState
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.nccl_transfer import ReceiveBuffer, TransferCall

READING = "reading"
READY = "ready"
SIGN_S = 1.0
_decoder = msgspec.msgpack.Decoder(TransferCall)
log = get_logger()


@runtime_checkable
class ReceivingEngine(Protocol):
    """An engine whose processes can receive weights while they compute."""

    @property
    def gpus(self) -> int:
        """Processes that compute, each on a GPU of its own."""
        ...

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why weights of these shapes are not this model's; nothing where they are."""
        ...

    def ask_processes(self, method: str, *args: str) -> list[str]:
        """What each process returns from a method of `vllm_extension.Extension`."""
        ...

    def load_received(self, number: int, digest: str) -> None:
        """Continue under weights that the processes have received.

        Raises:
            WeightsError: one of them does not have these; the engine goes on with what it had.
        """
        ...


class TransferReceiver:
    """Does what the trainer asks, a step at each `look`. What takes longer than `patience_s` is
    given up: the trainer does so too.
    """

    def __init__(
        self,
        state: TransferState,
        engine: ReceivingEngine,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._engine = engine
        self._patience_s = patience_s
        self._clock = clock
        self._seen = self._id_of(self._called())  # what was asked before is not for this one
        self._doing: TransferCall | None = None
        self._until = 0.0
        self._held = ""
        self._sign_at = float("-inf")
        self._sign()

    def look(self) -> None:
        """Begin what the trainer asks, or answer when it is done. Returns at once."""
        self._sign()
        call = self._called()
        if call is not None and call.id != self._seen and self._state.consumer in call.ranks:
            self._seen, self._doing, self._until = call.id, call, self._clock() + self._patience_s
            self._begin(call)
        if self._doing is not None:
            self._follow(self._doing)

    def holds(self, policy: PolicyVersion) -> bool:
        """Whether the engine's processes have received `policy`, and nothing since."""
        return self._held == policy.digest

    def load(self, policy: PolicyVersion) -> None:
        """Continue under `policy`, which they hold; afterwards they do not, beside the model.

        Raises:
            WeightsError: they do not have it.
        """
        self._held = ""
        self._engine.load_received(policy.number, policy.digest)

    def want(self, policy: PolicyVersion) -> None:
        """Ask the trainer for `policy` as a file."""
        self._state.request_file(policy.digest)

    def _sign(self) -> None:
        """Say who receives, now and then: a Redis that was emptied has forgotten it."""
        if self._clock() >= self._sign_at:
            self._sign_at = self._clock() + SIGN_S
            self._state.register_receiver(self._engine.gpus)

    def _begin(self, call: TransferCall) -> None:
        self._held = ""
        if call.kind == "join":
            self._engine.ask_processes(
                "onstream_join",
                json.dumps(call.info | {"rank_offset": call.ranks[self._state.consumer]}),
            )
        elif call.frame is not None and not (
            misfit := self._engine.misfit(ReceiveBuffer(call.frame).shapes)
        ):
            self._engine.ask_processes(
                "onstream_receive", json.dumps(call.info), msgspec.json.encode(call.frame).decode()
            )
        else:
            self._answer(call, misfit if call.frame is not None else "a call to receive nothing")

    def _follow(self, call: TransferCall) -> None:
        states = self._engine.ask_processes("onstream_staged")
        if READING not in states:
            self._answer(call, "; ".join(sorted({state for state in states if state != READY})))
        elif self._clock() > self._until:
            self._engine.ask_processes("onstream_leave")
            self._answer(call, f"not done within {self._patience_s:g} s")

    def _answer(self, call: TransferCall, problem: str) -> None:
        self._doing = None
        if problem:
            log.warning(
                "a transfer of weights failed; what was loaded serves on",
                call=call.kind,
                reason=problem,
            )
        elif call.frame is not None:
            self._held = call.frame.digest
        self._state.answer(call.id, problem)

    def _called(self) -> TransferCall | None:
        payload = self._state.current_call()
        return None if payload is None else _decoder.decode(payload)

    @staticmethod
    def _id_of(call: TransferCall | None) -> str:
        return call.id if call is not None else ""
