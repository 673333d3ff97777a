"""The engine over vLLM: requests are written by vLLM's own processes, and a thread of this one
collects what comes of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from onstream.pipeline.http import EventLoopThread
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.models.weight_shapes import WeightShapes
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest, require_possible
from onstream.workers.generator.engines.vllm.extension import READING, READY, RECEIVED
from onstream.workers.generator.engines.vllm.images import input_of
from onstream.workers.generator.engines.vllm.request import VllmRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import CompletionOutput

OnNewWeights = Literal["recompute", "keep", "wait", "abort"]
STEP_S = 0.02
STAGED_S = 0.002
LEAVE_S = 30.0
PAUSES: dict[OnNewWeights, tuple[str, bool]] = {
    "recompute": ("keep", True),
    "keep": ("keep", False),
    "wait": ("wait", True),
    "abort": ("abort", True),
}
"""What vLLM's pause does with running requests, and whether it clears the caches: of keys and
values, of prefixes, and of images.
"""


@dataclass(frozen=True)
class PolicyUpdate:
    """A version to load, from where vLLM's processes find it. `policy` is kept for as long as they
    may read its file.
    """

    number: int
    digest: str
    path: str
    policy: LoadedPolicy | None = None


class VllmEngine:
    """An `Engine` over vLLM's AsyncLLM.

    `add` hands requests to vLLM at once, which decodes `slots` of them and queues the others.
    `step` takes what is finished, and waits a moment where nothing is. `load` stages the weights
    while requests go on, and pauses them for the switch alone; but for the mode `wait` it returns
    after it.

    Args:
        config: as `vllm_start.configure` makes it.
        stop_ids: a completion ends with any of these.
        shapes: of the student's weights; others are refused before vLLM is asked.
        on_new_weights: what becomes of running completions when weights are loaded; an attribute,
            too, to change between loads. With `keep`, vLLM must not cache prefixes: those of old
            weights would begin completions of new ones.
        tried: what is asked first; for a model that reads images, with one.

    Raises:
        UserError: vLLM makes other tokens of an image than the student's processor.
        Exception: of whatever other kind; vLLM did not start.
    """

    def __init__(
        self,
        config: VllmConfig,
        stop_ids: Collection[int],
        shapes: WeightShapes,
        *,
        on_new_weights: OnNewWeights = "recompute",
        tried: GenerationRequest | None = None,
    ) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._shapes = shapes
        self.on_new_weights = on_new_weights
        self._slots = int(
            config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        )
        self._gpus = int(config.parallel_config.world_size_across_dp)
        self._replicas = int(config.parallel_config.data_parallel_size)
        self._context = int(config.model_config.max_model_len)
        self._active = 0
        self._finished = SimpleQueue[VllmRequest | BaseException]()
        self._version = 0
        self._target: PolicyUpdate | None = None
        self._switching: Future[PolicyUpdate] | None = None
        self._sent = VllmPrompts(config.model_config.hf_config)
        self._background = EventLoopThread()
        self._llm: Any = None  # an AsyncLLM, once it has started
        try:
            self._running = self._background.run(_opened())
            self._llm = self._background.run(_start(config))
            self._say_a_word(
                tried or GenerationRequest(0, np.zeros(4, dtype=np.int32), max_tokens=3, seed=0)
            )
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int:
        return self._context

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def replicas(self) -> int:
        return self._replicas

    @property
    def problem(self) -> str:
        return ""

    @property
    def active(self) -> int:
        return self._active

    @property
    def version(self) -> int:
        return self._version

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            require_possible(request, self._context)
        self._active += len(requests)
        if requests:
            self._background.submit(self._write_all([VllmRequest(request) for request in requests]))

    def step(self) -> list[Completion]:
        if self._switching is not None and self._switching.done():
            self._switched()
        if not self._active:
            return []
        finished: list[Completion] = []
        with suppress(Empty):
            finished.append(self._take(timeout_s=STEP_S))
            while True:
                finished.append(self._take(timeout_s=0.0))
        return finished

    def load(self, policy: LoadedPolicy) -> None:
        if misfit := self._shapes.misfit(policy.shapes):
            raise WeightsError(misfit)
        try:
            path = str(policy.file())
        except OSError as error:
            raise WeightsError(
                f"version {policy.number} cannot be written for vLLM to read: {error}"
            ) from error
        self._replace(PolicyUpdate(policy.number, policy.digest, path, policy))

    def load_received(self, number: int, digest: str) -> None:
        """Continue under weights that the processes have received from the trainer, as `load` does.

        Raises:
            WeightsError: one of them does not have these; the engine goes on with what it had.
        """
        self._replace(PolicyUpdate(number, digest, RECEIVED))

    @property
    def gpus(self) -> int:
        """Processes that compute, each on a GPU of its own."""
        return self._gpus

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why weights of these shapes are not this model's; nothing where they are."""
        return self._shapes.misfit(shapes)

    def ask_processes(self, method: str, *args: str) -> list[str]:
        """What each process returns from a method of `vllm_extension.Extension`."""
        return list(self._background.run(self._llm.collective_rpc(method, args=args)))

    def _replace(self, target: PolicyUpdate) -> None:
        self._stage(target.path, target.digest)
        self._target = target
        if self._switching is None:
            self._switching = self._background.submit(self._switch())
        if self.on_new_weights != "wait":
            self._switched()

    def close(self) -> None:
        async def end() -> None:
            if self._llm is not None:
                self._llm.shutdown()  # here, where vLLM's sockets belong

        self._background.stop(end, within_s=LEAVE_S)  # what runs is cancelled, and aborted by that
        self._llm = None  # or it is shut down again when the interpreter is half gone

    def _say_a_word(self, request: GenerationRequest) -> None:
        """Write a few tokens: of some models vLLM finds out no earlier that it cannot compute them,
        or reads their images otherwise.
        """
        self.add([request])
        while self._active:
            self.step()

    def _take(self, *, timeout_s: float) -> Completion:
        """The next that is finished.

        Raises:
            Empty: none is within `timeout_s`.
            Exception: vLLM failed; the engine cannot go on.
        """
        writing = (
            self._finished.get(timeout=timeout_s) if timeout_s else self._finished.get_nowait()
        )
        if isinstance(writing, BaseException):
            raise writing
        self._active -= 1
        return writing.completion()

    def _stage(self, path: str, digest: str) -> None:
        """Have every process of vLLM read and check the weights, while requests go on.

        Raises:
            WeightsError: one of them cannot; nothing was touched.
        """
        self.ask_processes("onstream_stage", path, digest)
        while READING in (states := self.ask_processes("onstream_staged")):
            time.sleep(STAGED_S)
        if problems := [state for state in states if state != READY]:
            raise WeightsError(problems[0])

    def _switched(self) -> None:
        """Wait for the switch, and begin another where newer weights came in its course."""
        assert self._switching is not None
        loaded = self._switching.result()
        self._version = loaded.number
        self._switching = None
        if self._target is not loaded:
            self._switching = self._background.submit(self._switch())

    async def _write_all(self, writings: Sequence[VllmRequest]) -> None:
        await asyncio.gather(*(self._write(writing) for writing in writings))

    async def _write(self, writing: VllmRequest) -> None:
        try:
            while writing.finish_reason is None:
                await self._running.wait()
                output = await self._ask(writing)
                writing.take(*_piece(output))
        except Exception as error:  # `step` raises it where the worker's loop sees it
            self._finished.put(error)
        else:
            self._finished.put(writing)

    async def _ask(self, writing: VllmRequest) -> CompletionOutput:
        """What vLLM writes until the request is finished, or aborted."""
        sampling = SamplingParams(
            **writing.sampling(self._stop_ids), output_kind=RequestOutputKind.FINAL_ONLY
        )
        key = str(writing.request.key)
        rank = writing.request.replica
        prompt = (
            input_of(writing, self._sent, self._llm.renderer)
            if writing.request.images
            else tokens_input(writing.prompt_ids)
        )
        [answer] = [
            one async for one in self._llm.generate(prompt, sampling, key, data_parallel_rank=rank)
        ]
        return answer.outputs[0]

    async def _switch(self) -> PolicyUpdate:
        """Pause, replace the weights by those staged last, and go on under them. Fails halfway only
        for good: it stays paused.
        """
        mode, clear_cache = PAUSES[self.on_new_weights]
        self._running.clear()
        await self._llm.pause_generation(mode=mode, clear_cache=clear_cache)
        if not clear_cache:
            await (
                self._llm.reset_encoder_cache()
            )  # what the old vision tower made of images is for no new completion
        assert self._target is not None
        target = self._target
        await self._llm.start_weight_update()
        await self._llm.update_weights(
            WeightTransferUpdateRequest({"path": target.path, "digest": target.digest})
        )
        await self._llm.finish_weight_update(str(target.number))
        await self._llm.resume_generation()
        self._running.set()
        return target


async def _start(config: VllmConfig) -> AsyncLLM:
    """The engine, with all its processes, as a part of the running loop. What it writes before the
    first update is of version 0.
    """
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    await llm.update_weight_version("0")
    return llm


async def _opened() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _piece(
    output: CompletionOutput,
) -> tuple[list[int], list[float], list[tuple[int, int, int]], str]:
    """What `Writing.take` takes. A request that was aborted before its first token has neither
    logprobs nor versions.
    """
    tokens = list(output.token_ids)
    logprobs: list[Any] = output.logprobs or []
    chosen = [position[token].logprob for position, token in zip(logprobs, tokens, strict=True)]
    spans = [(int(span.version), span.start, span.end) for span in output.weight_versions or []]
    return tokens, chosen, spans, output.finish_reason or ""
