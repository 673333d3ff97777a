"""Never run on a GPU. A generator's end of the transport `nccl`, which answers the trainer's calls.

The engine's processes do what the calls ask.
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
REGISTER_S = 1.0
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
        """Why weights of these shapes are not this model's; empty where they are."""
        ...

    def ask_processes(self, method: str, *args: str) -> list[str]:
        """What each process returns from a method of `vllm.extension.Extension`."""
        ...

    def load_received(self, number: int, digest: str) -> None:
        """Continue with weights that the processes have received.

        Raises:
            WeightsError: one of them does not have these; the engine goes on with those it has.
        """
        ...


class TransferReceiver:
    """Does what the trainer asks, a step at each `look`.

    What takes longer than `patience_s` is given up: by then the trainer has given it up too.
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
        # A call that is there already was for the receivers before this one.
        earlier = self._current_call()
        self._last_id = earlier.id if earlier is not None else ""
        self._call: TransferCall | None = None  # what the processes are doing
        self._deadline = 0.0
        self._received_digest = ""
        self._register_at = float("-inf")
        self._register()

    def look(self) -> None:
        """Begin what the trainer asks, or answer when it is done. Returns at once."""
        self._register()
        call = self._current_call()
        if call is not None and call.id != self._last_id and self._state.consumer in call.ranks:
            self._last_id = call.id
            self._call = call
            self._deadline = self._clock() + self._patience_s
            self._begin(call)
        if self._call is not None:
            self._follow(self._call)

    def has(self, policy: PolicyVersion) -> bool:
        """Whether the engine's processes have received `policy`, and nothing since."""
        return self._received_digest == policy.digest

    def load(self, policy: PolicyVersion) -> None:
        """Continue with `policy`, which the processes have received.

        Afterwards it is in their models only.

        Raises:
            WeightsError: they do not have it.
        """
        self._received_digest = ""
        self._engine.load_received(policy.number, policy.digest)

    def request_file(self, policy: PolicyVersion) -> None:
        """Ask the trainer for `policy` as a file."""
        self._state.request_file(policy.digest)

    def _register(self) -> None:
        """Say who receives, again and again: a Redis that was emptied has forgotten it."""
        if self._clock() >= self._register_at:
            self._register_at = self._clock() + REGISTER_S
            self._state.register_receiver(self._engine.gpus)

    def _begin(self, call: TransferCall) -> None:
        self._received_digest = ""
        if call.kind == "join":
            info = call.info | {"rank_offset": call.ranks[self._state.consumer]}
            self._engine.ask_processes("onstream_join", json.dumps(info))
            return
        if call.header is None:
            self._answer(call, "a call to receive nothing")
            return
        misfit = self._engine.misfit(ReceiveBuffer(call.header).shapes)
        if misfit:
            self._answer(call, misfit)
            return
        header = msgspec.json.encode(call.header).decode()
        self._engine.ask_processes("onstream_receive", json.dumps(call.info), header)

    def _follow(self, call: TransferCall) -> None:
        states = self._engine.ask_processes("onstream_staged")
        if READING not in states:
            problems = sorted({state for state in states if state != READY})
            self._answer(call, "; ".join(problems))
        elif self._clock() > self._deadline:
            self._engine.ask_processes("onstream_leave")
            self._answer(call, f"not done within {self._patience_s:g} s")

    def _answer(self, call: TransferCall, problem: str) -> None:
        self._call = None
        if problem:
            log.warning(
                "a transfer of weights failed; the loaded ones stay",
                call=call.kind,
                reason=problem,
            )
        elif call.header is not None:
            self._received_digest = call.header.digest
        self._state.answer(call.id, problem)

    def _current_call(self) -> TransferCall | None:
        payload = self._state.current_call()
        return None if payload is None else _decoder.decode(payload)
